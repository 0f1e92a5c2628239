"""show: a sample of a cache."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from extractor.cli.exit_codes import or_could_not_run
from extractor.cli.options import Debug, Json, OneCache
from extractor.cli.output import show as show_text


def show(
    cache: OneCache,
    sample: Annotated[int, typer.Argument(min=0, help="Its sample_id, from 0.", metavar="SAMPLE")],
    start: Annotated[int, typer.Option("--from", min=0, help="First token whose text is shown.")] = 0,
    stop: Annotated[
        int | None, typer.Option("--to", min=1, help="Token before which the text ends.", show_default=False)
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Look at a sample: its text with what is learned of it, the row it came from, and the norms of its states.

    Learned tokens are green on a terminal, and in \\[\\[ ]] elsewhere (or with NO_COLOR).
    A real target's first token has a norm far above the median.

    Example: dflash-cache show /data/cache 17 --from 0 --to 200
    """
    from extractor.job.show import describe, look_up, to_json
    from extractor.terminal.learned_text import wants_colour

    with or_could_not_run():
        shown = look_up(cache, sample, start, stop)
    show_text(to_json(shown) if as_json else describe(shown, wants_colour(sys.stdout)))
