"""Progress of long work: a live bar on a terminal, a plain line every few seconds elsewhere. Always to stderr."""

from __future__ import annotations

import sys
import time
from contextlib import suppress

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn
from rich.table import Column

from extractor.terminal.learned_text import printable

LINE_EVERY_SECONDS = 10.0


class Reporter:
    """Shows how far a piece of work is: ``update(done, note)`` as often as one likes, ``close()`` at its end."""

    def __init__(self, title: str, total: int | None, unit: str):
        """``total`` units of work, None where unknown."""
        self.title, self.total, self.unit = title, total, unit
        self.started = self._last = time.monotonic()
        self._first: int | None = None
        self._done, self._note = 0, ""
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description} {task.fields[note]}", table_column=Column(no_wrap=True)),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task(title, total=total, note="")
            self._bar.start()

    def update(self, done: int, note: str = "") -> None:
        """``done`` units so far (those found done at the first call do not count for the speed)."""
        if self._first is None:
            self._first = done
        self._done, self._note = done, note
        now = time.monotonic()
        if self._bar:
            self._bar.update(self._task, completed=done, note=self._line())
        elif now - self._last >= LINE_EVERY_SECONDS:
            self._last = now
            say(f"{self.title}: {self._line()}")

    def close(self) -> None:
        """Take the bar away."""
        if self._bar:
            self._bar.stop()

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _line(self) -> str:
        elapsed = max(time.monotonic() - self.started, 1e-9)
        speed = (self._done - (self._first or 0)) / elapsed
        parts = [f"{compact(self._done)}{f'/{compact(self.total)}' if self.total is not None else ''} {self.unit}"]
        parts += [self._note] if self._note else []
        if self.total and speed > 0:
            parts.append(f"ETA {duration((self.total - self._done) / speed)}")
        percent = f"{100 * self._done // self.total}% " if self.total else ""
        return percent + ", ".join(parts)


def say(text: str) -> None:
    """One line for the person at the terminal or in the log; a full log stops no work."""
    with suppress(OSError):
        print(printable(text), file=sys.stderr, flush=True)


def compact(number: float) -> str:
    """``1234567`` -> ``1.23M``: three digits, so that a line of progress fits a terminal of 80 columns."""
    for power, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= power:
            return f"{number / power:.3g}{unit}" if number < 999.5 * power else f"{number / power:.0f}{unit}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """``3725`` -> ``1h02m05s``."""
    whole = int(seconds + 0.5)
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours:
        return f"{hours}h{minutes:02d}m{whole % 60:02d}s"
    return f"{minutes}m{whole % 60:02d}s" if minutes else f"{whole}s"


def size(num_bytes: float) -> str:
    """``536870912`` -> ``512.0 MiB``."""
    units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]
    power = 0
    while abs(num_bytes) >= 1024 and power < len(units) - 1:
        num_bytes, power = num_bytes / 1024, power + 1
    return f"{num_bytes:,.0f} B" if power == 0 else f"{num_bytes:,.1f} {units[power]}"
