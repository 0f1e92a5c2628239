"""inspect: what a cache holds."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from extractor.cli.config_file import as_config
from extractor.cli.options import Cache, Debug, Json
from extractor.cli.output import show


def inspect(
    cache: Cache,
    everything: Annotated[
        bool,
        typer.Option("--all", help="Also its sources, all that a resume compares, and what it was made with."),
    ] = False,
    print_config: Annotated[
        bool,
        typer.Option("--print-config", help="The options that made it, as a file for --config; paths are absolute."),
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """What a cache holds and how it was made; reads the manifest alone. Of a collection, a line for each cache.

    Example: dflash-cache inspect /data/cache
    """
    from cache_format.layout.manifest import CommandLine
    from extractor.job.inspect import describe, describe_collection, summarise, summarise_collection

    if print_config:
        command = summarise(cache)["command"]
        show(as_config(str(cache), CommandLine(**command) if command else None))
        return
    collection = summarise_collection(cache)
    if collection is not None:
        show(json.dumps(collection) if as_json else describe_collection(collection))
        return
    summary = summarise(cache)
    show(json.dumps(summary) if as_json else describe(summary, everything))
