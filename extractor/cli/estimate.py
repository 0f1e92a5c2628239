"""estimate: what an extraction will take, before it is begun."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from extractor.cli.extract_options import extract_options
from extractor.cli.option_groups import DataGroup, SamplesGroup, StatesGroup, TokenizerGroup, flat
from extractor.cli.options import Debug, Json, Target
from extractor.cli.output import show


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
        show(describe(result))
