"""report: figures and pictures of a cache, before it is trusted."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from cache_format.errors import InputError
from extractor.cli.exit_codes import or_could_not_run
from extractor.cli.options import Debug, Json, OneCache
from extractor.cli.output import show


def report(
    cache: OneCache,
    html: Annotated[
        Path | None,
        typer.Option(
            help="Write one page that holds everything and loads nothing (pip install 'dflash-cache\\[report]').",
            show_default=False,
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples to look at, out of at most 128 shards.")] = 2000,
    also: Annotated[
        list[Path],
        typer.Option(
            "--with",
            help="A file with what `extract --json` or `verify --json` printed, for its waits or its verdict. "
            "May be given again. Without a verdict a quick check is made.",
            show_default=False,
        ),
    ] = [],  # noqa: B006
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Look at a cache before trusting it: samples, states and job, and what stands out of them in words.

    Reads some samples of some shards, not the cache; an unfinished one too. For every byte there is verify.

    Example: dflash-cache report /data/cache --html report.html
    """
    if html is not None:
        _require_place(html, cache)
    from extractor.report.given_results import read_given
    from extractor.report.make_report import fingerprint_of, make_report, to_dict
    from extractor.report.summary import describe
    from extractor.terminal.learned_text import wants_colour
    from extractor.terminal.progress import say

    with or_could_not_run():
        made = make_report(cache, samples, read_given(also, fingerprint_of(cache)) if also else None)
    if html is not None:
        from cache_format.storage.commit import committed, write_all
        from extractor.report.page import page

        text = page(made).encode("utf-8", "backslashreplace")
        with committed(html) as file:
            write_all(file, text)
        say(f"report: {html}, {len(text) / 1e6:.2f} MB")
    if as_json:
        show(json.dumps(to_dict(made)))
    else:
        colour = wants_colour(sys.stdout)
        show(describe(made, colour), coloured=colour)


def _require_place(html: Path, cache: Path | str) -> None:
    """Before any work: a page can be made and written there.

    Raises:
        InputError: it cannot.
    """
    from importlib.util import find_spec

    missing = [name for name in ("matplotlib", "jinja2") if find_spec(name) is None]
    if missing:
        raise InputError(f"--html needs {' and '.join(missing)}: pip install 'dflash-cache[report]'")
    if html.is_dir() or not html.parent.is_dir():
        raise InputError(f"--html {html}: is not a file in a folder that is there")
    if isinstance(cache, Path) and html.resolve().is_relative_to(cache.resolve()):
        raise InputError(f"--html {html}: lies in the cache, which holds nothing but its own files")
