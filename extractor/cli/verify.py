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
from extractor.cli.options import Adapter, Cache, Debug, Device, Json, TrustRemoteCode
from extractor.cli.output import show
from extractor.terminal.progress import Reporter, duration, say, size

if TYPE_CHECKING:
    from cache_format.upkeep.verify import VerifyReport
    from extractor.target.recompute import RecomputeReport


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
    adapter: Adapter = None,
    backend: Annotated[
        config.Backend | None,
        typer.Option(
            help="With --recompute: who computes the states. Default: as when the cache was made.", show_default=False
        ),
    ] = None,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check that a cache is whole: every sample exactly once, every byte as it was written.

    By default every byte is read and checked, so it takes as long as reading the cache (the estimate is shown). Lists
    every problem it finds, of a collection in each of its caches. Exit code 0: whole; 1: damaged or unfinished; 2:
    could not run.
    """
    from cache_format.layout.collection import listed_at

    if recompute and not target:
        raise InputError("--recompute needs --target, the target that the cache was made with")
    with or_could_not_run():
        listed = listed_at(cache) if isinstance(cache, Path) else None
    again: dict[str, Any] = {"device": device, "trust_remote_code": trust_remote_code}
    again |= {"adapter": adapter, "backend": backend}
    found = []
    for place, fingerprint in [(cache, None)] if listed is None else [(path, of.fingerprint) for path, of in listed]:
        found.append(_verified(place, fingerprint, quick=quick, recompute=recompute, target=target, **again))
        if not as_json:
            found[-1].say(recompute > 0)
    whole = all(one.report.whole for one in found)
    if as_json:
        each = [one.to_dict() for one in found]
        show(json.dumps(each[0] if listed is None else {"collection": str(cache), "whole": whole, "caches": each}))
    elif listed is not None:
        damaged = sum(not one.report.whole for one in found)
        show(f"{cache}: {len(found)} caches, " + ("all whole" if whole else f"{damaged} not whole"))
    if not whole:
        raise typer.Exit(EXIT_FAILED)


@dataclass(frozen=True)
class _Verified:
    """What was found of one cache."""

    report: VerifyReport
    again: RecomputeReport | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        from cache_format.upkeep.verify import PROVES

        report = self.report
        proves = {"proves": PROVES[report.depth]} if report.whole else {}
        extra = {} if self.again is None else {"recompute": asdict(self.again)}
        return {**asdict(report), "whole": report.whole, **proves, **extra}

    def say(self, wanted_again: bool) -> None:
        from cache_format.upkeep.verify import PROVES

        report, again = self.report, self.again
        for problem in report.problems:
            show(problem)
        speed = "" if report.depth == "quick" else f", {size(report.bytes)} at {self._speed:.2f} GB/s"
        verdict = "whole" if report.whole else f"{len(report.problems):,} problems"
        counts = f"{report.shards:,} shards, {report.samples:,} samples"
        show(f"{report.cache}: {verdict} ({report.depth} check: {counts}{speed})")
        if report.whole:
            show(f"this proves: {PROVES[report.depth]}")
        if again is not None:
            show(
                f"recomputed {again.samples:,} samples: no token is off by more than {again.largest_error:.2g} of its "
                "norm in any layer"
            )
            for layer, errors in again.layers.items():
                show(f"  layer {layer}: worst {errors.worst:.2g}, 99 % {errors.p99:.2g}, median {errors.median:.2g}")
            if report.whole:
                show("this proves: their states belong to their tokens and to that target")
        elif wanted_again:
            show("nothing was recomputed: first mend what is listed above")
        if any(problem.field != "state" for problem in report.problems):
            show(f"to mend it: dflash-cache repair {report.cache}")

    @property
    def _speed(self) -> float:
        return self.report.bytes / self.seconds / 1e9


def _verified(
    cache: Path | str, fingerprint: str | None, *, quick: bool, recompute: int, target: str | None, **options: Any
) -> _Verified:
    """Verify one cache. One that a collection lists and that is gone is a problem of the collection's."""
    from cache_format.storage.folder import shard_bytes
    from cache_format.upkeep.verify import Problem, VerifyReport
    from cache_format.upkeep.verify import verify as run_verify

    started = time.monotonic()
    if fingerprint is not None and not (Path(cache) / "manifest.json").exists():
        gone = Problem(file="manifest.json", problem="is missing, but collection.json lists this cache")
        return _Verified(VerifyReport(str(cache), "quick" if quick else "full", problems=[gone]), None, 1e-9)
    with or_could_not_run():
        total = shard_bytes(cache)
        if not quick:
            say(f"verify: reading all of {size(total)}; at 1 GB/s that takes {duration(max(total / 1e9, 1))}")
        with Reporter("verify", total, "bytes") as reporter:
            report = run_verify(
                cache,
                quick=quick,
                progress=lambda done: reporter.update(
                    done, f"{done / max(time.monotonic() - started, 1e-9) / 1e9:.2f} GB/s"
                ),
                listed=fingerprint,
            )
    seconds, again = max(time.monotonic() - started, 1e-9), None
    if recompute and target and report.whole:
        from extractor.target.recompute import recompute as run_recompute

        say(f"recompute: loading the target, then {recompute:,} forward passes of a sample each")
        again = run_recompute(cache, target, recompute, **options)
        report.problems += again.problems
    return _Verified(report, again, seconds)
