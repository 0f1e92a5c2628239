"""What is said to the person at the terminal or in the log: how much of it, and where it is kept."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cache_format.errors import InputError
from extractor.terminal.learned_text import printable


@dataclass(frozen=True, kw_only=True)
class Voice:
    """How much is said. Given to worker processes, which speak alike."""

    quiet: bool = False
    """only errors and warnings, and no progress"""
    verbose: bool = False
    """progress often, and what other libraries say"""
    log_file: Path | None = None
    """all of it is added here with the time, whether it is shown or not"""

    def __post_init__(self) -> None:
        if self.quiet and self.verbose:
            raise InputError("--quiet and --verbose contradict each other; give one of them")
        if self.log_file is not None:
            try:
                self.log_file.open("a").close()
            except OSError as error:
                raise InputError(f"--log-file {self.log_file}: cannot be written to: {error.strerror}") from error

    @property
    def line_every_seconds(self) -> float:
        """Between two lines of progress where there is no bar."""
        return 5.0 if self.verbose else 60.0


_voice = Voice()
_through: Callable[[str], None] | None = None


def speak(voice: Voice, through: Callable[[str], None] | None = None) -> None:
    """From now on, as ``voice`` says; a worker ``through`` its parent, whose bars it would write into."""
    global _voice, _through
    _voice, _through = voice, through


def voice() -> Voice:
    """What is spoken with."""
    return _voice


def say(text: str) -> None:
    """One line for the person at the terminal or in the log; a full log stops no work."""
    if _through is not None:
        with suppress(OSError):
            _through(text)
            return
    if not _voice.quiet or text.startswith(("error:", "warning:")):
        with suppress(OSError):
            print(printable(text), file=sys.stderr, flush=True)
    log(text)


def log(text: str) -> None:
    """One line for the log file alone, if there is one."""
    if _voice.log_file is not None:
        with suppress(OSError), _voice.log_file.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {printable(text)}\n")
