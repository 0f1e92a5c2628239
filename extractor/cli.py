"""The `dflash-cache` command: options, exit codes, errors without tracebacks. The work is done elsewhere.

Exit codes: 0 done or whole, 1 failed on the way or damaged, 2 could not start (bad input, another cache, locked),
130 stopped by SIGINT, 143 by SIGTERM (run it again).
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from cache_format.errors import CacheError, DFlashCacheError, InputError, MismatchError, StorageError
from cache_format.lock import LockedError
from extractor.progress import Reporter, duration, say, size
from extractor.signals import Stopped, stoppable

EXIT_FAILED, EXIT_COULD_NOT_START = 1, 2

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help=(
        "Run a frozen target LLM once over a dataset and cache what a DFlash draft trains on.\n\n"
        "[bold]estimate[/bold] what it will take, [bold]extract[/bold] it, [bold]inspect[/bold] and "
        "[bold]verify[/bold] it; a trainer reads it with cache_format.FeatureCache.\n\n"
        "Exit codes: 0 done or whole; 1 failed on the way, or damaged; 2 could not start (bad input, another "
        "cache, locked by another process); 130 or 143 stopped by Ctrl-C or SIGTERM, run it again."
    ),
)

_TARGET, _DATA, _SAMPLES, _SIZES = "The target", "The data", "Samples and loss mask", "Shards and batches"
_CLUSTER = "A cluster"

Target = Annotated[
    str, typer.Option(help="Hub id or local folder of the target LLM.", rich_help_panel=_TARGET, show_default=False)
]
Data = Annotated[
    str,
    typer.Option(
        help="A .jsonl, .json or .parquet file, a folder of them, a folder saved by datasets, or a hub id. Rows hold "
        "messages, conversations, prompt + response, text, or input_ids with loss_mask or labels.",
        rich_help_panel=_DATA,
        show_default=False,
    ),
]
TargetLayers = Annotated[
    str | None,
    typer.Option(
        help="Decoder layers to capture, such as 1,9,17,25,33; layer i's output is hidden_states\\[i + 1] of "
        "transformers. Default: the layers DFlash publishes for --num-draft-layers.",
        rich_help_panel=_TARGET,
        show_default=False,
    ),
]
NumDraftLayers = Annotated[
    int,
    typer.Option(min=1, help="Layers of the draft; one target layer is captured for each.", rich_help_panel=_TARGET),
]
Dtype = Annotated[
    str,
    typer.Option(
        help="float32, bfloat16 or float16, of the weights and of the stored states; auto: bfloat16 on CUDA, float32 "
        "on the CPU.",
        rich_help_panel=_TARGET,
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.", rich_help_panel=_TARGET)]
Attention = Annotated[
    str | None,
    typer.Option(
        help="Attention kernel of transformers, such as sdpa or flash_attention_2. Default: what it picks.",
        rich_help_panel=_TARGET,
        show_default=False,
    ),
]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a hub target.", rich_help_panel=_TARGET, show_default=False)
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the target.", rich_help_panel=_TARGET)
]
Split = Annotated[
    str | None,
    typer.Option(help="Split of a saved or hub dataset, such as train.", rich_help_panel=_DATA, show_default=False),
]
DataRevision = Annotated[
    str | None,
    typer.Option(help="Branch, tag or commit of a hub dataset.", rich_help_panel=_DATA, show_default=False),
]
Streaming = Annotated[
    bool,
    typer.Option("--streaming", help="Read rows as they come instead of downloading first.", rich_help_panel=_DATA),
]
Limit = Annotated[
    int | None,
    typer.Option(min=1, help="Only the first N rows: a trial run.", rich_help_panel=_DATA, show_default=False),
]
OnBadRow = Annotated[
    str,
    typer.Option(help="fail at a malformed row, naming it, or skip and count it.", rich_help_panel=_DATA),
]
RowFormat = Annotated[
    str | None,
    typer.Option(
        help="messages, conversations, prompt-response, text or input_ids. Default: told from the columns.",
        rich_help_panel=_SAMPLES,
        show_default=False,
    ),
]
LossOn = Annotated[
    str | None,
    typer.Option(
        help="assistant: the assistant's tokens, end-of-turn included; all: every token; column: the loss_mask or "
        "labels of pre-tokenised rows. Default: column for input_ids rows, else assistant.",
        rich_help_panel=_SAMPLES,
        show_default=False,
    ),
]
MaxLength = Annotated[int, typer.Option(min=1, help="Tokens of the longest sample.", rich_help_panel=_SAMPLES)]
TooLong = Annotated[
    str,
    typer.Option(
        help="truncate longer samples to their first --max-length tokens, or drop them.", rich_help_panel=_SAMPLES
    ),
]
MinLossTokens = Annotated[
    int,
    typer.Option(
        min=0,
        help="Drop samples with fewer learned tokens than this. A draft is trained on blocks that start at learned "
        "tokens, so a sample without one teaches nothing; SpecForge asks for twice the block_size (32 for blocks "
        "of 16).",
        rich_help_panel=_SAMPLES,
    ),
]
Capture = Annotated[
    list[str],
    typer.Option(
        help="Beside hidden_states: last_hidden_states (what the LM head takes; DSpark) or logits-topk=K (the K "
        "largest logits and the log-sum-exp; JetSpec). May be given twice. The whole target is then run.",
        rich_help_panel=_TARGET,
        show_default=False,
    ),
]
ShardSize = Annotated[str, typer.Option(help="Largest shard file, counted before the codec.", rich_help_panel=_SIZES)]
BatchTokens = Annotated[
    str,
    typer.Option(
        help="Tokens of one forward pass, padding included: memory against speed. auto: the most that fit the device, "
        "found by trying once and kept for the whole cache.",
        rich_help_panel=_SIZES,
    ),
]
Devices = Annotated[
    str | None,
    typer.Option(
        help="Several devices of this machine, a worker process each: all, or a list such as cuda:0,cuda:1 or cpu,cpu. "
        "The same bytes as with one.",
        rich_help_panel=_TARGET,
        show_default=False,
    ),
]
Engine = Annotated[
    str,
    typer.Option(
        help="local: this process, --devices, torchrun or srun. ray: actors of a Ray cluster whose nodes all see the "
        "cache, the data and the target under the same paths (pip install 'dflash-cache\\[ray]').",
        rich_help_panel=_CLUSTER,
    ),
]
Address = Annotated[
    str | None,
    typer.Option(
        help="With --engine ray: auto (the cluster that this node is of) or host:port. Default: RAY_ADDRESS, or a "
        "cluster of this machine alone.",
        rich_help_panel=_CLUSTER,
        show_default=False,
    ),
]
NumWorkers = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="With --engine ray: actors, each with the target. More than there is room for make an autoscaling cluster "
        "grow. Default: what it has room for at the start; without GPUs, one a node.",
        rich_help_panel=_CLUSTER,
        show_default=False,
    ),
]
GpusPerWorker = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="With --engine ray: GPUs of each actor; more than one needs --device-map auto. Default: 1, or 0 with "
        "--device cpu.",
        rich_help_panel=_CLUSTER,
        show_default=False,
    ),
]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        help="auto: divide a target that is too large for one device over all of them, layer by layer (needs the "
        "package accelerate).",
        rich_help_panel=_TARGET,
        show_default=False,
    ),
]
TpPlan = Annotated[
    str | None,
    typer.Option(
        help="auto: divide each layer of a target that is too large for one device over all processes of torchrun "
        "(tensor parallelism); the states round differently.",
        rich_help_panel=_TARGET,
        show_default=False,
    ),
]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile",
        help="torch.compile the decoder layers. Pays on long jobs; the states round differently.",
        rich_help_panel=_TARGET,
    ),
]
Deterministic = Annotated[
    bool,
    typer.Option(
        "--deterministic",
        help="Only kernels that give the same bits every time; an operation without one is an error.",
        rich_help_panel=_TARGET,
    ),
]
OnNonfinite = Annotated[
    str,
    typer.Option(
        help="Where the target gives NaN or Inf: fail, naming sample and layer, or quarantine: leave the sample out "
        "and list it.",
        rich_help_panel=_SAMPLES,
    ),
]
Codec = Annotated[
    str,
    typer.Option(
        help="How hidden states are stored. raw: as they are, read without a copy. zbits: lossless, about 0.67 of "
        "bfloat16. fp8: float8 with a scale for each token and layer, 0.50 of bfloat16, SNR about 34 dB.",
        rich_help_panel=_SIZES,
    ),
]


def _place(text: str) -> Path | str:
    """A folder, or a checked URL."""
    from cache_format.store import is_url, parse_url

    return parse_url(text) if is_url(text) else Path(text)


def _folder(text: str) -> Path:
    place = _place(text)
    if isinstance(place, str):
        raise InputError(
            f"{place}: this command writes to a local folder; a finished cache or export is plain files, which the "
            "store's own tool can upload (aws s3 sync, gcloud storage rsync)"
        )
    return place


Cache = Annotated[
    Any, typer.Argument(help="Folder or URL of the cache.", parser=_place, metavar="CACHE", show_default=False)
]
Scratch = Annotated[
    Path | None,
    typer.Option(
        help="With a URL: local folder in which files are made before they are uploaded; it holds the prepared "
        "samples and a few shards. Default: below the system's temporary folder, the same for a rerun.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Report as JSON on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@app.command()
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
    attn_implementation: Attention = None,
    compile: Compile = False,
    deterministic: Deterministic = False,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    split: Split = None,
    data_revision: DataRevision = None,
    streaming: Streaming = False,
    limit: Limit = None,
    on_bad_row: OnBadRow = "fail",
    row_format: RowFormat = None,
    loss_on: LossOn = None,
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
    from extractor.engine.local import extract_on, parse_devices
    from extractor.engine.worker import Worker
    from extractor.job import extract as run_extract

    options, worker = _options(locals()), Worker.from_environment()
    if tp_plan is not None and devices is not None:
        raise InputError("--devices runs a whole target on each device, --tp-plan divides one over all; give one")
    if tp_plan is not None and worker.rank > 0:
        from extractor.engine.tensor_parallel import follow

        follow(options)
        return
    if tp_plan is not None:
        worker = Worker(local_rank=worker.local_rank)
    if devices is not None and worker.world_size > 1:
        raise InputError("--devices starts workers of its own; leave it out under torchrun or srun")
    if engine not in ("local", "ray"):
        raise InputError(f"--engine {engine!r}: choose local or ray")
    if engine == "ray" and options.url is not None:
        raise InputError(
            "--engine ray writes to a folder that all nodes share; for a URL use --devices, torchrun or srun"
        )
    if engine == "ray":
        from extractor.engine.ray import RayOptions, extract_with_ray

        if devices is not None or worker.world_size > 1:
            raise InputError("--engine ray starts workers of its own; leave out --devices, torchrun and srun")
        cluster = RayOptions(address=address, num_workers=num_workers, gpus_per_worker=gpus_per_worker)
        report = extract_with_ray(options, cluster)
    elif (address, num_workers, gpus_per_worker) != (None, None, None):
        raise InputError("--address, --num-workers and --gpus-per-worker are for --engine ray")
    elif devices is not None:
        report = extract_on(parse_devices(devices), options)
    else:
        report = run_extract(options, worker)
    if as_json:
        _print(json.dumps(asdict(report)))
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
    if report.quarantined:
        say(f"quarantined: {report.quarantined:,} samples with non-finite states; `dflash-cache inspect` lists them")


@app.command()
def estimate(
    target: Target,
    data: Data,
    out: Annotated[Path | None, typer.Option(help="Folder whose disk is looked at for free space.")] = None,
    target_layers: TargetLayers = None,
    num_draft_layers: NumDraftLayers = 5,
    capture: Capture = [],  # noqa: B006
    dtype: Dtype = "auto",
    device: Device = "auto",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    split: Split = None,
    data_revision: DataRevision = None,
    streaming: Streaming = False,
    limit: Limit = None,
    on_bad_row: OnBadRow = "fail",
    row_format: RowFormat = None,
    loss_on: LossOn = None,
    max_length: MaxLength = 4096,
    too_long: TooLong = "truncate",
    min_loss_tokens: MinLossTokens = 1,
    codec: Codec = "raw",
    shard_size: ShardSize = "512MiB",
    batch_tokens: BatchTokens = "8192",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Bytes, shards and tokens of a cache, from the data and the target's config; no weights are loaded.

    Up to 10,000 rows are tokenised; larger data is estimated from rows spread evenly over it.
    """
    from extractor.estimate import describe
    from extractor.estimate import estimate as run_estimate

    result = run_estimate(_options({**locals(), "out": out or Path.cwd()}))
    if as_json:
        _print(json.dumps(asdict(result)))
    else:
        _print(describe(result))


@app.command()
def inspect(cache: Cache, as_json: Json = False, debug: Debug = False) -> None:
    """What a cache holds and how it was made; reads the manifest alone."""
    from extractor.inspect import describe, summarise

    summary = summarise(cache)
    _print(json.dumps(summary) if as_json else describe(summary))


@app.command()
def verify(
    cache: Cache,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="Only the manifest, tables, sizes, shard headers and coverage. Proves that nothing is missing, cut, "
            "swapped or listed twice, not that every byte is right. Reads about 1 byte in 10,000: seconds.",
        ),
    ] = False,
    recompute: Annotated[
        int,
        typer.Option(
            min=0,
            help="After that, run the target again on N random samples and compare. Proves that the states belong to "
            "their tokens and to that target. Takes as long as loading the target and N forward passes.",
            show_default=False,
        ),
    ] = 0,
    target: Annotated[
        str | None, typer.Option(help="With --recompute: hub id or folder of the target.", show_default=False)
    ] = None,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check that a cache is whole: every sample exactly once, every byte as it was written.

    By default every byte is read and checked, so it takes as long as reading the cache (the estimate is shown). Lists
    every problem it finds. Exit code 0: whole; 1: damaged or unfinished; 2: could not run.
    """
    from cache_format.integrity import PROVES
    from cache_format.integrity import verify as run_verify

    if recompute and not target:
        raise InputError("--recompute needs --target, the target that the cache was made with")
    started = time.monotonic()
    with _or_could_not_run():
        total = _shard_bytes(cache)
        if not quick:
            say(f"verify: reading all of {size(total)}; at 1 GB/s that takes {duration(max(total / 1e9, 1))}")
        with Reporter("verify", total, "bytes") as reporter:
            report = run_verify(
                cache,
                quick=quick,
                progress=lambda done: reporter.update(
                    done, f"{done / max(time.monotonic() - started, 1e-9) / 1e9:.2f} GB/s"
                ),
            )
    seconds = max(time.monotonic() - started, 1e-9)
    again = None
    if recompute and target and report.whole:
        from extractor.recompute import recompute as run_recompute

        say(f"recompute: loading the target, then {recompute:,} forward passes of a sample each")
        again = run_recompute(cache, target, recompute, device=device, trust_remote_code=trust_remote_code)
        report.problems += again.problems
    if as_json:
        extra = {} if again is None else {"recompute": asdict(again)}
        _print(json.dumps({**asdict(report), "whole": report.whole, "proves": PROVES[report.depth], **extra}))
    else:
        for problem in report.problems:
            _print(problem)
        speed = "" if quick else f", {size(report.bytes)} at {report.bytes / seconds / 1e9:.2f} GB/s"
        verdict = "whole" if report.whole else f"{len(report.problems):,} problems"
        _print(
            f"{cache}: {verdict} ({report.depth} check: {report.shards:,} shards, {report.samples:,} samples{speed})"
        )
        if report.whole:
            _print(f"this proves: {PROVES[report.depth]}")
        if again is not None:
            _print(f"recomputed {again.samples:,} samples: off by at most {again.largest_error:.2g} of a layer's RMS")
            if report.whole:
                _print("this proves: their states belong to their tokens and to that target")
        elif recompute:
            _print("nothing was recomputed: first mend what is listed above")
        if not report.whole:
            _print(f"to mend it: dflash-cache repair {cache}")
    if not report.whole:
        raise typer.Exit(EXIT_FAILED)


@app.command()
def repair(
    cache: Cache,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask, on a terminal.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Set damaged files aside in quarantine/ (nothing is deleted) and leave a cache that extract can finish.

    Verifies every byte first. Damaged tables are rebuilt from the shards; damaged shards are made again by the cache's
    extract command, which makes just those. On a terminal it says what it will do and asks. Exit code 0: whole, or
    whole again; 1: now run the extract command; 2: could not run.
    """
    from cache_format.integrity import verify as run_verify
    from cache_format.repair import plan_repair
    from cache_format.repair import repair as run_repair

    with _or_could_not_run():
        with Reporter("verify", None, "bytes") as reporter:
            report = run_verify(cache, progress=reporter.update)
        plan = plan_repair(cache, report.problems)
    if as_json:
        _print(json.dumps({**asdict(report), "plan": asdict(plan), "dry_run": dry_run}))
    else:
        for problem in report.problems:
            _print(problem)
        for name in plan.set_aside:
            _print(f"set aside: {name} -> quarantine/")
        if report.whole:
            _print(f"{cache}: whole, nothing to repair")
        else:
            _print(f"state afterwards: {plan.state or 'none: extract writes a new manifest'}")
    if report.whole:
        return
    if not dry_run and not yes and sys.stdin.isatty() and sys.stderr.isatty():
        dry_run = not typer.confirm("Do this?", err=True)
    if not dry_run:
        run_repair(cache, plan)
    if dry_run or plan.needs_extract:
        todo = f"now run the extract command of {cache} again; it makes what is missing"
        say("nothing was changed" if dry_run else todo)
        raise typer.Exit(EXIT_FAILED)


@app.command()
def export(
    cache: Cache,
    out: Annotated[Any, typer.Argument(help="Folder to write: new, or begun by the same command.", parser=_folder)],
    to: Annotated[
        str,
        typer.Option(help="specforge, speculators, modelopt, deepspec or nemo-dspark.", show_default=False),
    ],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask, on a terminal.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the files that another project's own offline reader opens. The same command again resumes it.

    A trainer that reads the cache itself (see the README) needs no copy of it: an export is as large as the cache, or
    larger, so its size is shown first, and on a terminal it asks. Each sample's checksum is checked on the way.
    modelopt, deepspec and nemo-dspark hold the target's last hidden states: extract with --capture last_hidden_states.
    speculators holds the output of the target's last layer: name it in --target-layers.

    Example: dflash-cache export /data/cache --to specforge /data/specforge
    """
    from cache_format import FeatureCache
    from cache_format.export import LAYOUTS, plan_export
    from cache_format.export import export as run_export

    if to not in LAYOUTS:
        raise InputError(f"--to {to}: choose one of {', '.join(LAYOUTS)}")
    with _or_could_not_run():
        source = FeatureCache.open(cache, verify="sample")
    plan = plan_export(source, LAYOUTS[to], out)
    done = f", {plan.done_files:,} of them done" if plan.done_files else ""
    say(f"{out}: {plan.files:,} files, {size(plan.bytes)}{done}; {size(plan.free_bytes)} free. Reader: {plan.reader}")
    if not yes and sys.stdin.isatty() and sys.stderr.isatty() and not typer.confirm("Write them?", err=True):
        say("nothing was changed")
        raise typer.Exit(EXIT_FAILED)
    with Reporter("export", plan.bytes, "bytes") as reporter:
        report = run_export(
            source, LAYOUTS[to], out, progress=lambda files, done: reporter.update(done, f"{files:,} files")
        )
    if as_json:
        _print(json.dumps({**asdict(report), "plan": asdict(plan)}))
        return
    say(f"{out}: complete, {report.files:,} files written, {report.done_files:,} were there")
    if report.left_out:
        say(f"left out: {report.left_out:,} samples that {plan.reader} refuses (no two adjacent learned tokens)")
    for line in plan.settings:
        say(f"set in the trainer: {line}")


@app.command()
def recode(
    cache: Cache,
    out: Annotated[
        Any,
        typer.Argument(
            help="Folder or URL of the copy: new, or begun by the same command.", parser=_place, metavar="OUT"
        ),
    ],
    codec: Annotated[
        str,
        typer.Option(
            help="raw, zbits (lossless, about 0.67 of bfloat16) or fp8 (0.50 of bfloat16, SNR about 34 dB).",
            show_default=False,
        ),
    ],
    threads: Annotated[
        int, typer.Option(min=1, help="Shards worked on at a time; each takes memory for two shards.")
    ] = 2,
    scratch: Scratch = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Copy a cache with another codec, without its target; the cache itself stays as it is.

    Each sample's checksum is checked as it is read. The same command again resumes. The copy is the cache that extract
    would have made with that --codec, so the same extract command can mend it.

    Example: dflash-cache recode /data/cache /data/cache-fp8 --codec fp8
    """
    from cache_format import FeatureCache
    from cache_format.recode import recode as run_recode
    from cache_format.recode_to_store import recode_to_store

    try:
        source = FeatureCache.open(cache, verify="sample")
    except CacheError as error:
        raise InputError(str(error)) from error
    total = _shard_bytes(cache)
    done = 0

    def count(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        reporter.update(done)

    place = _destination(out, scratch)
    with Reporter("recode", total, "bytes") as reporter:
        if "url" in place:
            report = recode_to_store(
                source, place["url"], place["out"], codec, threads=threads, progress=count, tell=say
            )
        else:
            report = run_recode(source, place["out"], codec, threads=threads, progress=count)
    if as_json:
        _print(json.dumps(asdict(report)))
        return
    say(f"{out}: complete, {report.shards:,} shards made, {report.done_shards:,} were there")
    say(f"{size(report.bytes_before)} -> {size(report.bytes)}; states {100 * report.ratio:.1f} % of raw")
    if report.snr_db:
        say(f"SNR by layer: {', '.join(f'{snr:.1f} dB' for snr in report.snr_db)}")


def _shard_bytes(cache: Path | str) -> int:
    from cache_format.folder import open_folder

    folder = open_folder(cache)
    total = 0
    for name in folder.names("shards"):
        with suppress(CacheError):
            total += (folder.size(f"shards/{name}") or 0) if name.endswith(".safetensors") else 0
    return total


def _destination(out: Path | str, scratch: Path | None) -> dict[str, Any]:
    """``out`` and ``url`` of ExtractOptions."""
    from cache_format.upload import scratch_folder

    place = _place(str(out))
    if isinstance(place, str):
        return {"out": scratch_folder(place, scratch), "url": place}
    if scratch is not None:
        raise InputError("--scratch is for an --out that is a URL; a folder needs none")
    return {"out": place}


def _options(arguments: dict[str, Any]) -> Any:
    """The command line as an ExtractOptions."""
    from extractor.config import (
        DataOptions,
        ExtractOptions,
        TargetOptions,
        parse_batch_tokens,
        parse_captures,
        parse_size,
    )
    from extractor.layer_ids import parse_layer_ids
    from extractor.plan import PlanOptions
    from extractor.prepare import PrepareOptions

    def taken(*names: str) -> dict[str, Any]:
        return {name: arguments[name] for name in names if name in arguments}

    layers = arguments["target_layers"]
    return ExtractOptions(
        **_destination(arguments["out"], arguments.get("scratch")),
        target=TargetOptions(
            name=arguments["target"],
            target_layer_ids=None if layers is None else tuple(parse_layer_ids(layers)),
            **taken("num_draft_layers", "dtype", "device", "attn_implementation", "revision", "trust_remote_code"),
            **taken("device_map", "tp_plan", "compile", "deterministic"),
        ),
        data=DataOptions(name=arguments["data"], **taken("split", "data_revision", "streaming")),
        prepare=PrepareOptions(
            **taken("max_length", "too_long", "min_loss_tokens", "loss_on", "row_format", "on_bad_row", "limit")
        ),
        plan=PlanOptions(
            shard_bytes=parse_size(arguments["shard_size"]),
            batch_tokens=parse_batch_tokens(arguments["batch_tokens"]),
        ),
        capture=parse_captures(arguments["capture"]),
        **taken("on_nonfinite", "profile", "codec"),
    )


@contextmanager
def _or_could_not_run() -> Iterator[None]:
    """Exit code 2 where a cache cannot be looked at, so that 1 means that it was looked at and is damaged."""
    try:
        yield
    except (CacheError, StorageError) as error:
        raise InputError(str(error)) from error
    except OSError as error:
        raise InputError(str(StorageError(error.filename or "the cache", "read", error))) from error


def _print(text: object) -> None:
    """Print a report at once: a full disk behind ``> report.json`` shows here, as any other.

    Raises:
        StorageError: it cannot be written.
    """
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise  # ``| head``: typer ends quietly
    except OSError as error:
        # Given up: Python would try once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise StorageError("standard output", "write the report", error) from error


def main() -> None:
    """Entry point of the console command."""
    debug = "--debug" in sys.argv
    if not sys.stderr.isatty():
        # The libraries' own progress bars would fill a log file; ours writes a line now and then.
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    to_go_on = f"what was finished is kept. To go on: {shlex.join(['dflash-cache', *sys.argv[1:]])}"
    try:
        with stoppable(to_go_on):
            app(standalone_mode=True)
    except Stopped as stop:
        say(f"{stop}; {to_go_on}")
        sys.stdout.flush()
        # Threads of libraries may still run; nothing they do is needed any more.
        os._exit(stop.exit_code)
    except DFlashCacheError as error:
        if debug:
            traceback.print_exc()
        say(f"error: {error}")
        could_not_start = isinstance(error, InputError | MismatchError | LockedError)
        sys.exit(EXIT_COULD_NOT_START if could_not_start else EXIT_FAILED)
    except OSError as error:
        if debug:
            traceback.print_exc()
        where = error.filename or ""
        say(f"error: {StorageError(where, 'go on', error) if where else error}")
        sys.exit(EXIT_FAILED)
