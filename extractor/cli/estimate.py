"""estimate: what an extraction will take, before it is begun."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import asdict
from inspect import signature
from pathlib import Path
from typing import Annotated

import typer

from extractor.cli.extract import extract
from extractor.cli.extract_options import extract_options
from extractor.cli.option_groups import DataGroup, SamplesGroup, StatesGroup, TokenizerGroup, flat, spread
from extractor.cli.options import Debug, Json, Target
from extractor.cli.output import show
from extractor.cli.shown import shown


def estimate(
    target: Target,
    tokenizer: TokenizerGroup,
    data: DataGroup,
    samples: SamplesGroup,
    states: StatesGroup,
    out: Annotated[Path | None, typer.Option(help="Folder whose disk is looked at for free space.")] = None,
    calibrate: Annotated[
        bool,
        typer.Option("--calibrate", help="Load the target and time a few batches: how long will it take?"),
    ] = False,
    tokens_per_second: Annotated[
        float | None,
        typer.Option(help="Of one worker: how long does it take at that rate?", show_default=False),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Bytes, shards and tokens of a cache, from the data and the target's config; no weights are loaded but for
    --calibrate. With that, or with --tokens-per-second, hours, GPU-hours and what the disk must take, too.

    Up to 10,000 rows are tokenised; larger data is estimated from rows spread evenly over it.

    Example: dflash-cache estimate --target Qwen/Qwen3-8B --data train.jsonl
    """
    given = locals()
    from extractor.job.estimate import describe
    from extractor.job.estimate import estimate as run_estimate

    options = extract_options({**flat(given), "out": out or Path.cwd()})
    result = run_estimate(options, tokens_per_second=tokens_per_second, calibrate=calibrate)
    if as_json:
        show(json.dumps(asdict(result)))
    else:
        show(f"{describe(result)}\n\nto run it: {_extract_command(sys.argv)}")


def _extract_command(arguments: list[str]) -> str:
    """The command line of an estimate as that of the extraction."""
    of_extract = {one.names[0] for one in map(shown, signature(spread(extract)).parameters.values())}
    words, skip = ["dflash-cache", "extract"], False
    given = arguments[arguments.index("estimate") + 1 :] if "estimate" in arguments else []
    for word, after in zip(given, [*given[1:], ""], strict=True):
        name = word.partition("=")[0]
        if skip:
            skip = False
        elif word.startswith("--") and name not in of_extract:
            skip = "=" not in word and not after.startswith("-") and name != "--calibrate"
        else:
            words.append(word)
    has_out = any(word.partition("=")[0] in ("--out", "--config") for word in words)
    return shlex.join(words if has_out else [*words, "--out", "OUT"])
