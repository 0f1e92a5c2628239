"""verify: is a cache whole, and do its states belong to their tokens?"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cache_format.errors import InputError
from extractor import config
from extractor.cli.exit_codes import EXIT_FAILED, or_could_not_run
from extractor.cli.options import Adapter, Address, Cache, Debug, Device, Json, TrustRemoteCode
from extractor.cli.output import show
from extractor.terminal.progress import Reporter, duration, say, size

if TYPE_CHECKING:
    from cache_format.upkeep.verify import VerifyReport
    from cache_format.upkeep.which_shards import WhichShards
    from extractor.target.recompute import RecomputeReport

_PART = "A part of the shards, and going on"


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
    sample: Annotated[
        float | None,
        typer.Option(
            help="Check this share of the shards, drawn at random, such as 0.01. The same ones for the same --seed.",
            rich_help_panel=_PART,
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Of --sample. Default: 0.", rich_help_panel=_PART, show_default=False),
    ] = None,
    shards: Annotated[
        str | None,
        typer.Option(
            help="Check these shards, such as 0-999 or 3,17-20; with --sample, a share of them.",
            rich_help_panel=_PART,
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Keep what was found right, and go on from there if an earlier run was killed. A shard counts while "
            "its size and time are the same. Once everything is found right it is forgotten.",
            rich_help_panel=_PART,
        ),
    ] = False,
    state: Annotated[
        Path | None,
        typer.Option(
            help="With --resume: folder of what was found right; it has to outlive the machine. Default: one for this "
            "cache below ~/.cache/dflash-cache/verify.",
            rich_help_panel=_PART,
            show_default=False,
        ),
    ] = None,
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
    adapter: Adapter = None,
    backend: Annotated[
        config.Backend | None,
        typer.Option(
            help="With --recompute: who computes the states. Default: as when the cache was made.", show_default=False
        ),
    ] = None,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    engine: Annotated[
        config.Engine,
        typer.Option(
            help="local: this process; under torchrun, srun or in a Slurm array each process checks its part. ray: a "
            "worker on each node of a Ray cluster; they see a CACHE that is a folder under the same path.",
        ),
    ] = "local",
    address: Address = None,
    num_workers: Annotated[
        int | None,
        typer.Option(min=1, help="With --engine ray: workers. Default: one a node.", show_default=False),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check that a cache is whole: every sample exactly once, every byte as it was written.

    By default every byte is read and checked, so it takes as long as reading the cache (the estimate is shown). Lists
    every problem it finds, of a collection in each of its caches. Exit code 0: whole, as far as it was checked; 1:
    damaged or unfinished; 2: could not run.

    Example: dflash-cache verify /data/cache --quick
    """
    from cache_format.layout.collection import listed_at
    from extractor.job.worker import Worker

    which, worker = _which(sample, seed, shards), Worker.from_environment()
    if recompute and not target:
        raise InputError("--recompute needs --target, the target that the cache was made with")
    if recompute and worker.world_size > 1:
        raise InputError("--recompute is for one process; leave it out under torchrun or srun, and run it by itself")
    if resume and quick:
        raise InputError("--resume keeps which shards were read and found right; --quick does not read them")
    if state is not None and not resume:
        raise InputError("--state says where --resume keeps what was found right; give --resume too")
    if engine == "ray" and worker.world_size > 1:
        raise InputError("--engine ray starts workers of its own; leave out torchrun and srun")
    if engine == "local" and (address, num_workers) != (None, None):
        raise InputError("--address and --num-workers are for --engine ray")
    cluster = {"address": address, "num_workers": num_workers} if engine == "ray" else None
    with or_could_not_run():
        listed = listed_at(cache) if isinstance(cache, Path) else None
    if listed is not None and which.ranges:
        raise InputError(f"--shards: {cache} is a collection of {len(listed)} caches; verify one of them")
    again: dict[str, Any] = {"count": recompute, "target_name": target, "device": device}
    again |= {"trust_remote_code": trust_remote_code, "adapter": adapter, "backend": backend}
    found = []
    for place, fingerprint in [(cache, None)] if listed is None else [(path, of.fingerprint) for path, of in listed]:
        keep = _state(place, state if listed is None or state is None else state / place.name) if resume else None
        part = {"which": which, "rank": worker.rank, "world_size": worker.world_size, "state": keep}
        found.append(_verified(place, quick, fingerprint, part, cluster, again))
        if not as_json:
            found[-1].say(recompute > 0)
    whole = all(one.report.whole for one in found)
    if as_json:
        each = [one.to_dict() for one in found]
        show(json.dumps(each[0] if listed is None else {"collection": str(cache), "whole": whole, "caches": each}))
    elif listed is not None:
        damaged = sum(not one.report.whole for one in found)
        right = "all whole" if all(one.of_all for one in found) else "no problem in what was checked"
        show(f"{cache}: {len(found)} caches, " + (right if whole else f"{damaged} not whole"))
    if not whole:
        raise typer.Exit(EXIT_FAILED)


def _which(sample: float | None, seed: int | None, shards: str | None) -> WhichShards:
    from cache_format.upkeep.which_shards import WhichShards, parse_ranges

    if seed is not None and sample is None:
        raise InputError("--seed is of the drawing of --sample; give --sample too, such as --sample 0.01")
    ranges = () if shards is None else parse_ranges(shards)
    return WhichShards(share=1.0 if sample is None else sample, seed=seed or 0, ranges=ranges)


def _state(cache: Path | str, wanted: Path | None) -> Path:
    from cache_format.upkeep.state import state_folder

    place = wanted or state_folder(cache)
    say(f"verify: what is found right is kept in {place}")
    return place


class _Progress:
    """A line or bar of the bytes checked, with the speed; and how long it took."""

    def __init__(self, quick: bool):
        self._quick, self._reporter, self.seconds = quick, Reporter("verify", None, "bytes"), 1e-9
        self._began: float | None = None

    def __enter__(self) -> _Progress:
        return self

    def update(self, done: int, total: int) -> None:
        if self._began is None:
            self._began, self._reporter.total = time.monotonic(), total
            if not self._quick:
                say(f"verify: reading {size(total)}; at 1 GB/s that takes {duration(max(total / 1e9, 1))}")
        self.seconds = max(time.monotonic() - self._began, 1e-9)
        self._reporter.update(done, f"{done / self.seconds / 1e9:.2f} GB/s")

    def __exit__(self, *exc: object) -> None:
        self._reporter.close()


@dataclass(frozen=True)
class _Verified:
    """What was found of one cache."""

    report: VerifyReport
    again: RecomputeReport | None
    seconds: float

    @property
    def of_all(self) -> bool:
        """Whether no shard was left out."""
        return self.report.shards == self.report.of_shards

    def to_dict(self) -> dict[str, Any]:
        report = self.report
        proves = {"proves": report.proves} if report.whole else {}
        extra = {} if self.again is None else {"recompute": asdict(self.again)}
        return {**asdict(report), "whole": report.whole, **proves, **extra}

    def say(self, wanted_again: bool) -> None:
        report, again = self.report, self.again
        for problem in report.problems:
            show(problem)
        show(f"{report.cache}: {self._verdict} ({report.depth} check: {self._amount})")
        if report.whole:
            show(f"this proves: {report.proves}")
        if again is not None:
            show(
                f"recomputed {again.samples:,} samples: no token is off by more than {again.largest_error:.2g} of its "
                "norm in any layer"
            )
            by_name = {f"layer {layer}": errors for layer, errors in again.layers.items()}
            if again.last_hidden_states is not None:
                by_name["last_hidden_states"] = again.last_hidden_states
            for name, errors in by_name.items():
                show(f"  {name}: worst {errors.worst:.2g}, 99 % {errors.p99:.2g}, median {errors.median:.2g}")
            if report.whole:
                show("this proves: their states belong to their tokens and to that target")
        elif wanted_again:
            show("nothing was recomputed: first mend what is listed above")
        if any(problem.field != "state" for problem in report.problems):
            show(f"to mend it: dflash-cache repair {report.cache}")

    @property
    def _verdict(self) -> str:
        if not self.report.whole:
            return f"{len(self.report.problems):,} problems"
        return "whole" if self.of_all else "no problem in what was checked"

    @property
    def _amount(self) -> str:
        report = self.report
        of = "" if self.of_all else f" of {report.of_shards:,}"
        counts = f"{report.shards:,}{of} shards, {report.samples:,} samples"
        if report.depth == "quick":
            return counts
        return f"{counts}, {size(report.bytes_read)} at {report.bytes_read / self.seconds / 1e9:.2f} GB/s"


def _verified(
    cache: Path | str,
    quick: bool,
    fingerprint: str | None,
    part: dict[str, Any],
    cluster: dict[str, Any] | None,
    again: dict[str, Any],
) -> _Verified:
    """Verify one cache. One that a collection lists and that is gone is a problem of the collection's."""
    from cache_format.upkeep.problem import Problem
    from cache_format.upkeep.verify import VerifyReport
    from cache_format.upkeep.verify import verify as run_verify

    if fingerprint is not None and not (Path(cache) / "manifest.json").exists():
        gone = Problem(file="manifest.json", problem="is missing, but collection.json lists this cache")
        return _Verified(VerifyReport(str(cache), "quick" if quick else "full", problems=[gone]), None, 1e-9)
    engine = None
    if cluster is not None:
        from extractor.engine.ray_cluster import RayOptions
        from extractor.engine.ray_verify import by_ray

        engine = by_ray(cache, quick, RayOptions(**cluster))
    with or_could_not_run(), _Progress(quick) as progress:
        report = run_verify(cache, quick=quick, listed=fingerprint, engine=engine, progress=progress.update, **part)
    recomputed = None
    if again["count"] and report.whole:
        from extractor.target.recompute import recompute as run_recompute

        say(f"recompute: loading the target, then {again['count']:,} forward passes of a sample each")
        recomputed = run_recompute(cache, **again)
        report.problems += recomputed.problems
    return _Verified(report, recomputed, progress.seconds)
