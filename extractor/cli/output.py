"""Reports on standard output; progress and messages go to standard error (terminal/progress.py)."""

from __future__ import annotations

import os
import sys

from cache_format.errors import StorageError
from extractor.terminal.learned_text import printable


def show(text: object, *, coloured: bool = False) -> None:
    """Print a report at once: a full disk behind ``> report.json`` shows here, as any other.

    Names of files and what manifests say are foreign: what a terminal would obey is shown as an escape. ``coloured``:
    it is escaped already, and its colours are ours.

    Raises:
        StorageError: it cannot be written.
    """
    try:
        print(text if coloured else printable(str(text)), flush=True)
    except BrokenPipeError:
        raise  # ``| head``: typer ends quietly
    except OSError as error:
        # Given up: Python would try once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise StorageError("standard output", "write the report", error) from error
