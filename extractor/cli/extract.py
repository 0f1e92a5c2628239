"""extract: run the target over the data, or go on where an earlier run stopped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from extractor.cli.command_line import this_command
from extractor.cli.extract_options import extract_options
from extractor.cli.option_groups import DataGroup, SamplesGroup, StatesGroup, TokenizerGroup, flat
from extractor.cli.options import (
    Adapter,
    Address,
    Attention,
    Backend,
    Compile,
    Debug,
    Deterministic,
    DeviceMap,
    Devices,
    Engine,
    Epochs,
    ExpertParallel,
    Experts,
    GpusPerWorker,
    Json,
    Keep,
    NumWorkers,
    OnNonfinite,
    PipelineParallel,
    Scratch,
    StrictHardware,
    Target,
    TensorParallel,
    TpPlan,
)


def extract(
    target: Target,
    tokenizer: TokenizerGroup,
    data: DataGroup,
    samples: SamplesGroup,
    states: StatesGroup,
    out: Annotated[
        str,
        typer.Option(
            help="Folder of the cache: new, or begun by the same command. Or a URL: s3://, gs:// or "
            "hf:// (pip install 'dflash-cache\\[s3]', gcs, hub); credentials from the environment.",
            show_default=False,
        ),
    ],
    scratch: Scratch = None,
    devices: Devices = None,
    device_map: DeviceMap = None,
    tp_plan: TpPlan = None,
    backend: Backend = "transformers",
    tensor_parallel: TensorParallel = 1,
    pipeline_parallel: PipelineParallel = 1,
    expert_parallel: ExpertParallel = False,
    attn_implementation: Attention = None,
    experts_implementation: Experts = None,
    compile: Compile = False,
    deterministic: Deterministic = False,
    strict_hardware: StrictHardware = False,
    adapter: Adapter = None,
    on_nonfinite: OnNonfinite = "fail",
    keep: Keep = None,
    epochs: Epochs = None,
    profile: Annotated[
        Path | None,
        typer.Option(help="Write a Chrome trace: what each thread and the device did when.", show_default=False),
    ] = None,
    engine: Engine = "local",
    address: Address = None,
    num_workers: NumWorkers = None,
    gpus_per_worker: GpusPerWorker = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run the target over the data and write the cache. The same command again resumes it.

    Example: dflash-cache extract --target Qwen/Qwen3-8B --data train.jsonl --out cache
    """
    given = locals()
    from extractor.cli.run_job import Cluster, run_job

    options = replace(extract_options(flat(given)), command=this_command())
    cluster = Cluster(engine=engine, address=address, num_workers=num_workers, gpus_per_worker=gpus_per_worker)
    run_job(options, devices=devices, cluster=cluster, as_json=as_json)
