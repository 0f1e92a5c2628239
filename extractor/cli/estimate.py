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
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Bytes, shards and tokens of a cache, from the data and the target's config; no weights are loaded.

    Up to 10,000 rows are tokenised; larger data is estimated from rows spread evenly over it.

    Example: dflash-cache estimate --target Qwen/Qwen3-8B --data train.jsonl
    """
    given = locals()
    from extractor.job.estimate import describe
    from extractor.job.estimate import estimate as run_estimate

    result = run_estimate(extract_options({**flat(given), "out": out or Path.cwd()}))
    if as_json:
        show(json.dumps(asdict(result)))
    else:
        show(describe(result))
