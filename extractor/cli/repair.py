"""repair: set damaged files aside, so that extract makes them again."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Annotated

import typer

from extractor.cli.exit_codes import EXIT_FAILED, or_could_not_run
from extractor.cli.options import Debug, Json, OneCache
from extractor.cli.output import show
from extractor.terminal.progress import Reporter, say


def repair(
    cache: OneCache,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask, on a terminal.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Set damaged files aside in quarantine/ (nothing is deleted) and leave a cache that extract can finish.

    Verifies every byte first. Damaged tables are rebuilt from the shards; damaged shards are made again by the cache's
    extract command, which makes just those. On a terminal it says what it will do and asks. Exit code 0: whole, or
    whole again; 1: now run the extract command; 2: could not run.

    Example: dflash-cache repair /data/cache --dry-run
    """
    from cache_format.storage.folder import open_folder
    from cache_format.upkeep.repair import command_of, plan_repair
    from cache_format.upkeep.repair import repair as run_repair
    from cache_format.upkeep.verify import verify as run_verify

    with or_could_not_run():
        stamps = open_folder(cache).stamps()
        with Reporter("verify", None, "bytes") as reporter:
            report = run_verify(cache, progress=lambda done, total: reporter.update(done))
        plan, again = plan_repair(cache, report.problems, stamps), command_of(cache)
    if as_json:
        planned = {"set_aside": plan.set_aside, "state": plan.state}
        show(json.dumps({**asdict(report), "plan": planned, "dry_run": dry_run}))
    else:
        for problem in report.problems:
            show(problem)
        for name in plan.set_aside:
            show(f"set aside: {name} -> quarantine/")
        if report.whole:
            show(f"{cache}: whole, nothing to repair")
        else:
            show(f"state afterwards: {plan.state or 'none: extract writes a new manifest'}")
    if report.whole:
        return
    if not dry_run and not yes and sys.stdin.isatty() and sys.stderr.isatty():
        dry_run = not typer.confirm("Do this?", err=True)
    if not dry_run:
        run_repair(cache, plan)
    if dry_run or plan.needs_extract:
        todo = "now run this again; it makes what is missing: " + again
        say("nothing was changed" if dry_run else todo)
        raise typer.Exit(EXIT_FAILED)
