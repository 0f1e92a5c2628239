"""export: a cache as another project's offline reader wants it."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer

from extractor.cli.exit_codes import EXIT_FAILED, or_could_not_run
from extractor.cli.options import Debug, Json, OneCache, folder
from extractor.cli.output import show
from extractor.config import ExportLayout
from extractor.terminal.progress import Reporter, say, size


def export(
    cache: OneCache,
    out: Annotated[Any, typer.Argument(help="Folder to write: new, or begun by the same command.", parser=folder)],
    to: Annotated[ExportLayout, typer.Option(help="Whose reader opens them.", show_default=False)],
    layers: Annotated[
        str | None,
        typer.Option(help="Only these of the cache's layers, in this order, such as 1,9,17.", show_default=False),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16: cast the states. Default: as stored.", show_default=False),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask, on a terminal.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the files that another project's own offline reader opens. The same command again resumes it.

    A trainer that reads the cache itself (see the README) needs no copy of it: an export is as large as the cache, or
    larger, so its size is shown first, and on a terminal it asks. Each sample's checksum is checked on the way.
    modelopt, deepspec, angelslim and nemo-dspark hold the target's last hidden states: extract with --capture
    last_hidden_states. speculators holds the output of the target's last layer: name it in --target-layers.

    Example: dflash-cache export /data/cache --to specforge /data/specforge
    """
    from cache_format import FeatureCache
    from cache_format.export import LAYOUTS, plan_export, seen_by
    from cache_format.export import export as run_export
    from extractor.target.layer_ids import parse_layer_ids

    with or_could_not_run():
        source = seen_by(
            LAYOUTS[to],
            FeatureCache.open(cache, verify="sample"),
            None if layers is None else parse_layer_ids(layers, "--layers"),
            dtype,
        )
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
        show(json.dumps({**asdict(report), "plan": asdict(plan)}))
        return
    say(f"{out}: complete, {report.files:,} files written, {report.done_files:,} were there")
    if report.left_out:
        say(f"left out: {report.left_out:,} samples that {plan.reader} refuses (no two adjacent learned tokens)")
    for line in plan.settings:
        say(f"set in the trainer: {line}")
