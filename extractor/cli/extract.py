"""extract: run the target over the data, or go on where an earlier run stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from extractor.cli.extract_options import extract_options
from extractor.cli.options import (
    Adapter,
    Address,
    Attention,
    Backend,
    BatchTokens,
    Capture,
    ChatTemplate,
    ChatTemplateKwargs,
    Codec,
    Columns,
    Compile,
    Data,
    DataConfig,
    DataRevision,
    Debug,
    Deterministic,
    Device,
    DeviceMap,
    Devices,
    Dtype,
    Engine,
    Epochs,
    ExpertParallel,
    Experts,
    GpusPerWorker,
    Json,
    Keep,
    Limit,
    LossOn,
    MaxLength,
    MinLossTokens,
    NumDraftLayers,
    NumWorkers,
    OnBadRow,
    OnNonfinite,
    PipelineParallel,
    Revision,
    RowFormat,
    Scratch,
    ShardSize,
    Split,
    Streaming,
    StrictHardware,
    SystemPrompt,
    Target,
    TargetLayers,
    TemplateDate,
    TensorParallel,
    TooLong,
    TpPlan,
    TrustRemoteCode,
    Turns,
)


def extract(
    target: Target,
    data: Data,
    out: Annotated[
        str,
        typer.Option(
            help="Folder of the cache: new, or begun by the same command. Or a URL: s3://, gs:// or "
            "hf:// (pip install 'dflash-cache\\[s3]', gcs, hub); credentials from the environment.",
            show_default=False,
        ),
    ],
    scratch: Scratch = None,
    target_layers: TargetLayers = None,
    num_draft_layers: NumDraftLayers = 5,
    capture: Capture = [],  # noqa: B006
    dtype: Dtype = "auto",
    device: Device = "auto",
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
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    split: Split = None,
    data_config: DataConfig = None,
    data_revision: DataRevision = None,
    streaming: Streaming = False,
    limit: Limit = None,
    on_bad_row: OnBadRow = "fail",
    row_format: RowFormat = None,
    columns: Columns = None,
    loss_on: LossOn = None,
    turns: Turns = "all",
    chat_template: ChatTemplate = None,
    chat_template_kwargs: ChatTemplateKwargs = None,
    system_prompt: SystemPrompt = None,
    template_date: TemplateDate = None,
    max_length: MaxLength = 4096,
    too_long: TooLong = "truncate",
    min_loss_tokens: MinLossTokens = 1,
    on_nonfinite: OnNonfinite = "fail",
    codec: Codec = "raw",
    shard_size: ShardSize = "512MiB",
    batch_tokens: BatchTokens = "8192",
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

    Example: dflash-cache extract --target Qwen/Qwen3-8B --data train.jsonl --out /data/cache
    """
    from extractor.cli.run_job import Cluster, run_job

    cluster = Cluster(engine=engine, address=address, num_workers=num_workers, gpus_per_worker=gpus_per_worker)
    run_job(extract_options(locals()), devices=devices, cluster=cluster, as_json=as_json)
