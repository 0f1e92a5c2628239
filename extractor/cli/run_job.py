"""One extraction, run where the command line says - here, on several devices, on a cluster - and what it did."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass

from cache_format.errors import InputError
from extractor.cli.output import show
from extractor.config import ExtractOptions
from extractor.engine.local import engine_devices, extract_on, parse_devices
from extractor.job.job import extract
from extractor.job.report import ExtractReport, bad_row_notes, dropped_note
from extractor.job.worker import Worker
from extractor.terminal.progress import duration, say, size


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """``--engine`` and its options."""

    engine: str = "local"
    address: str | None = None
    num_workers: int | None = None
    gpus_per_worker: int | None = None


def run_job(
    options: ExtractOptions,
    *,
    devices: str | None,
    cluster: Cluster,
    as_json: bool,
    then: Callable[[ExtractReport], None] = lambda report: None,
) -> None:
    """Run it and show its report; ``then`` is called before that with what was done.

    Raises:
        InputError: the ways to run it that were asked for contradict each other.
        DFlashCacheError: as ``extractor.job.job.extract``.
    """
    worker = Worker.from_environment()
    report = _ran(options, worker, devices, cluster)
    if report is None:
        return
    then(report)
    if as_json:
        show(json.dumps(asdict(report)))
    else:
        _say(report, worker)


def _ran(options: ExtractOptions, worker: Worker, devices: str | None, cluster: Cluster) -> ExtractReport | None:
    """None: this process followed another one, which has the report."""
    if cluster.engine == "ray":
        from extractor.engine.ray import RayOptions, extract_with_ray

        if devices is not None or worker.world_size > 1:
            raise InputError("--engine ray starts workers of its own; leave out --devices, torchrun and srun")
        if options.keep is not None:
            raise InputError("--keep is for one machine (--devices, torchrun), not for --engine ray")
        ray = RayOptions(
            address=cluster.address, num_workers=cluster.num_workers, gpus_per_worker=cluster.gpus_per_worker
        )
        return extract_with_ray(options, ray)
    if cluster != Cluster():
        raise InputError("--address, --num-workers and --gpus-per-worker are for --engine ray")
    if devices is not None:
        if options.target.tp_plan is not None:
            raise InputError("--devices runs a whole target on each device, --tp-plan divides one over all; give one")
        if worker.world_size > 1:
            raise InputError("--devices starts workers of its own; leave it out under torchrun or srun")
        return extract_on(engine_devices(parse_devices(devices), options.target.devices), options)
    if options.target.tp_plan is None:
        return extract(options, worker)
    if worker.rank > 0:
        from extractor.target.tensor_parallel import follow

        follow(options)
        return None
    # The processes of --tp-plan are one worker.
    return extract(options, Worker(local_rank=worker.local_rank))


def _say(report: ExtractReport, worker: Worker) -> None:
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
