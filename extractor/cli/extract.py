"""extract: run the target over the data, or go on where an earlier run stopped."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cache_format.errors import InputError
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
    ExpertParallel,
    Experts,
    GpusPerWorker,
    Json,
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
from extractor.cli.output import show
from extractor.terminal.progress import duration, say, size


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
    from extractor.engine.local import engine_devices, extract_on, parse_devices
    from extractor.job.job import extract as run_extract
    from extractor.job.report import bad_row_notes, dropped_note
    from extractor.job.worker import Worker

    options, worker = extract_options(locals()), Worker.from_environment()
    if engine == "ray":
        from extractor.engine.ray import RayOptions, extract_with_ray

        if devices is not None or worker.world_size > 1:
            raise InputError("--engine ray starts workers of its own; leave out --devices, torchrun and srun")
        cluster = RayOptions(address=address, num_workers=num_workers, gpus_per_worker=gpus_per_worker)
        report = extract_with_ray(options, cluster)
    elif (address, num_workers, gpus_per_worker) != (None, None, None):
        raise InputError("--address, --num-workers and --gpus-per-worker are for --engine ray")
    elif devices is not None:
        if tp_plan is not None:
            raise InputError("--devices runs a whole target on each device, --tp-plan divides one over all; give one")
        if worker.world_size > 1:
            raise InputError("--devices starts workers of its own; leave it out under torchrun or srun")
        report = extract_on(engine_devices(parse_devices(devices), options.target.devices), options)
    elif tp_plan is not None and worker.rank > 0:
        from extractor.target.tensor_parallel import follow

        follow(options)
        return
    else:
        # The processes of --tp-plan are one worker.
        report = run_extract(options, worker if tp_plan is None else Worker(local_rank=worker.local_rank))
    if as_json:
        show(json.dumps(asdict(report)))
        return
    run = report.run
    padding = 100 * (1 - run.tokens / run.padded_tokens) if run.padded_tokens else 0.0
    speed = run.tokens / run.seconds if run.seconds else 0.0
    state = "complete" if report.complete else f"worker {worker.rank} of {worker.world_size} has done its share"
    say(f"{report.cache}: {state}, {report.samples:,} samples, {report.tokens:,} tokens, {report.shards:,} shards")
    if run.shards:
        say(
            f"this run: {run.shards:,} shards, {size(run.bytes)} in {duration(run.seconds)}, {speed:,.0f} tok/s, "
            f"padding {padding:.1f} %"
        )
        say(
            f"first batch after {duration(run.seconds_to_first_batch)}; the target waited "
            f"{run.seconds_waiting_for_disk:.1f} s for the disk, writing took {run.seconds_writing:.1f} s beside it"
        )
    if any(report.dropped.values()):
        say(f"dropped rows: {dropped_note(report.dropped)}")
    for note in bad_row_notes(report.bad_rows):
        say(f"bad rows: {note}")
    if report.quarantined:
        say(f"quarantined: {report.quarantined:,} samples with non-finite states; `dflash-cache inspect` lists them")
