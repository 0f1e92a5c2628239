"""verify: is a cache whole, and do its states belong to their tokens?"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import Annotated

import typer

from cache_format.errors import InputError
from extractor import config
from extractor.cli.exit_codes import EXIT_FAILED, or_could_not_run
from extractor.cli.options import Adapter, Cache, Debug, Device, Json, TrustRemoteCode
from extractor.cli.output import show
from extractor.terminal.progress import Reporter, duration, say, size


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
    every problem it finds. Exit code 0: whole; 1: damaged or unfinished; 2: could not run.
    """
    from cache_format.storage.folder import shard_bytes
    from cache_format.upkeep.verify import PROVES
    from cache_format.upkeep.verify import verify as run_verify

    if recompute and not target:
        raise InputError("--recompute needs --target, the target that the cache was made with")
    started = time.monotonic()
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
            )
    seconds = max(time.monotonic() - started, 1e-9)
    again = None
    if recompute and target and report.whole:
        from extractor.target.recompute import recompute as run_recompute

        say(f"recompute: loading the target, then {recompute:,} forward passes of a sample each")
        again = run_recompute(
            cache,
            target,
            recompute,
            device=device,
            trust_remote_code=trust_remote_code,
            adapter=adapter,
            backend=backend,
        )
        report.problems += again.problems
    if as_json:
        proves = {"proves": PROVES[report.depth]} if report.whole else {}
        extra = {} if again is None else {"recompute": asdict(again)}
        show(json.dumps({**asdict(report), "whole": report.whole, **proves, **extra}))
    else:
        for problem in report.problems:
            show(problem)
        speed = "" if quick else f", {size(report.bytes)} at {report.bytes / seconds / 1e9:.2f} GB/s"
        verdict = "whole" if report.whole else f"{len(report.problems):,} problems"
        show(f"{cache}: {verdict} ({report.depth} check: {report.shards:,} shards, {report.samples:,} samples{speed})")
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
        elif recompute:
            show("nothing was recomputed: first mend what is listed above")
        if any(problem.field != "state" for problem in report.problems):
            show(f"to mend it: dflash-cache repair {cache}")
    if not report.whole:
        raise typer.Exit(EXIT_FAILED)
