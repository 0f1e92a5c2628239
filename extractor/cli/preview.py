"""preview: rows as they will be stored, before anything is run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from extractor.cli.extract_options import extract_options
from extractor.cli.option_groups import DataGroup, SamplesGroup, TokenizerGroup, flat
from extractor.cli.options import Debug, Json, Target
from extractor.cli.output import show as show_text


def preview(
    target: Target,
    tokenizer: TokenizerGroup,
    data: DataGroup,
    samples: SamplesGroup,
    rows: Annotated[int, typer.Option("-n", min=0, help="Show the first N rows.")] = 5,
    row: Annotated[
        str | None,
        typer.Option(
            help="Show this row alone, whole: its number from 1, or FILE:NUMBER as messages name it "
            "(train.jsonl row 17). Of a bad row: says why.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Look at rows as extract would store them: what is learned, where each is cut, and why rows are dropped.

    Learned tokens are green on a terminal, and in \\[\\[ ]] elsewhere (or with NO_COLOR). Reads config and tokenizer of
    the target, not its weights. Counts what becomes of the first 1,000 rows.

    Example: dflash-cache preview --target Qwen/Qwen3-8B --data train.jsonl
    """
    not_asked: dict[str, Any] = {
        "out": Path.cwd(),
        "target_layers": None,
        "capture": [],
        "shard_size": "512MiB",
        "batch_tokens": "1",
    }
    options = extract_options({**flat(locals()), **not_asked})
    from extractor.job.preview import Preview, counts_to_dict, describe_counts, describe_row, row_to_dict
    from extractor.terminal.learned_text import wants_colour

    looked = Preview(options)
    shown = looked.first(rows) if row is None else iter([looked.at(row)])
    if as_json:
        report: dict[str, object] = {"rows": [row_to_dict(looked, found) for found in shown]}
        show_text(json.dumps(report if row else {**report, "counts": counts_to_dict(looked.counts())}))
        return
    colour = wants_colour(sys.stdout)
    for found in shown:
        show_text(describe_row(looked, found, colour, whole=row is not None) + "\n", coloured=True)
    if row is None:
        show_text(describe_counts(looked.counts(), looked))
