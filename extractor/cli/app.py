"""The commands together: help, exit codes, errors without tracebacks.

Exit codes: 0 done or whole, 1 failed on the way or damaged, 2 could not start (bad input, another cache, locked),
130 stopped by SIGINT, 143 by SIGTERM (run it again).
"""

from __future__ import annotations

import errno
import os
import re
import shlex
import sys
import traceback
from typing import Annotated

import typer

from cache_format import __version__
from cache_format.errors import DFlashCacheError, InputError, MismatchError, StorageError
from cache_format.storage.lock import LockedError
from extractor.cli.append import append
from extractor.cli.command import Command, Group
from extractor.cli.estimate import estimate
from extractor.cli.exit_codes import EXIT_COULD_NOT_START, EXIT_FAILED
from extractor.cli.export import export
from extractor.cli.extract import extract
from extractor.cli.import_cache import import_cache
from extractor.cli.inspect import inspect
from extractor.cli.option_groups import spread
from extractor.cli.preview import preview
from extractor.cli.recode import recode
from extractor.cli.repair import repair
from extractor.cli.report import report
from extractor.cli.show import show
from extractor.cli.verify import verify
from extractor.cli.vocab_map import vocab_map
from extractor.terminal.progress import say
from extractor.terminal.signals import Stopped, stoppable


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dflash-cache {__version__}")
        raise typer.Exit


app = typer.Typer(
    cls=Group,
    add_completion=True,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help=(
        "Run a frozen target LLM once over a dataset and cache what a DFlash draft trains on.\n\n"
        "[bold]preview[/bold] the data, [bold]estimate[/bold] what it will take, [bold]extract[/bold] it, "
        "[bold]inspect[/bold], [bold]show[/bold], [bold]report[/bold] and [bold]verify[/bold] it; a trainer reads it "
        "with cache_format.FeatureCache.\n\n"
        "Exit codes: 0 done or whole; 1 failed on the way, or damaged; 2 could not start (bad input, another "
        "cache, locked by another process); 130 or 143 stopped by Ctrl-C or SIGTERM, run it again."
    ),
)


_NO_MEMORY = re.compile(
    # threads, torch, the dynamic linker (twice), and the interpreter where an extension forgets to say why
    "can't start new thread|can't allocate memory|[Cc]annot allocate memory|failed to map segment|"
    "error return without exception set"
)


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


for command in (preview, estimate, extract, append, inspect, show, report, verify, repair, export, recode, vocab_map):
    app.command(cls=Command)(spread(command))
app.command("import", cls=Command)(spread(import_cache))


def main() -> None:
    """Entry point of the console command."""
    debug = "--debug" in sys.argv
    to_go_on = f"what was finished is kept. To go on: {shlex.join(['dflash-cache', *sys.argv[1:]])}"
    try:
        with stoppable(to_go_on):
            app(standalone_mode=True)
    except Stopped as stop:
        say(f"{stop}; {to_go_on}")
        sys.stdout.flush()
        # Threads of libraries may still run; nothing they do is needed any more.
        os._exit(stop.exit_code)
    except DFlashCacheError as error:
        if debug:
            traceback.print_exc()
        say(f"error: {error}")
        could_not_start = isinstance(error, InputError | MismatchError | LockedError) or _is_a_wrong_name(error)
        sys.exit(EXIT_COULD_NOT_START if could_not_start else EXIT_FAILED)
    except OSError as error:
        if debug:
            traceback.print_exc()
        where = error.filename or ""
        say(f"error: {StorageError(where, 'go on', error) if where else error}")
        sys.exit(EXIT_COULD_NOT_START if _is_a_wrong_name(error) else EXIT_FAILED)
    except (MemoryError, RuntimeError, SystemError, ImportError) as error:
        if debug or not _is_out_of_memory(error):
            raise
        lacks = "not enough memory (ulimit -v, or the container's limit), or no more threads (ulimit -u)"
        say(f"error: {lacks}; {to_go_on}")
        sys.exit(EXIT_FAILED)


def _is_out_of_memory(error: Exception) -> bool:
    """Of the host; a device that is full says so itself. A library that finds no memory raises what it likes."""
    chain: list[BaseException] = [error]
    while (before := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(before)
    return any(isinstance(one, MemoryError) or _NO_MEMORY.search(str(one)) for one in chain)


def _is_a_wrong_name(error: Exception) -> bool:
    """A name that no file system takes: too long, or a loop of links."""
    return getattr(error, "errno", None) in (errno.ENAMETOOLONG, errno.ELOOP)
