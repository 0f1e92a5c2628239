"""Progress of long work: live bars on a terminal, a plain line a minute elsewhere. Always to stderr."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column

from extractor.terminal.voice import log, say, voice

LONGEST_BAR = 40
"""columns"""


class Reporter:
    """Shows how far a piece of work is: ``update(done, note)`` as often as one likes, ``close()`` at its end.

    On a terminal a line with a bar for the whole, and one for each of its workers; with ``--quiet`` nothing.
    """

    def __init__(self, title: str, total: int | None, unit: str):
        """``total`` units of work, None where unknown."""
        self.title, self.total, self.unit = title, total, unit
        self._began = self._last = time.monotonic()
        self._first: int | None = None
        self._done, self._note = 0, ""
        self._bar = _bar() if sys.stderr.isatty() and not voice().quiet else None
        self._workers: dict[str, TaskID] = {}
        if self._bar:
            self._task = self._bar.add_task(title, total=total, line="")
            self._bar.start()

    def update(self, done: int, note: str = "") -> None:
        """``done`` units so far (those found done at the first call do not count for the speed)."""
        now = time.monotonic()
        if self._first is None:
            self._first, self._began = done, now
        self._done, self._note = done, note
        if self._bar:
            self._bar.update(self._task, completed=done, total=self.total, line=self._line())
        if now - self._last >= voice().line_every_seconds:
            self._last = now
            (log if self._bar else say)(f"{self.title}: {self._percent()}{self._line()}")

    def worker(self, name: str, done: int, total: int | None, note: str) -> None:
        """How far one of several workers is; a line of its own on a terminal."""
        if not self._bar:
            return
        if name not in self._workers:
            self._workers[name] = self._bar.add_task(f"  {name}", total=total, line="")
        line = ", ".join(filter(None, [f"{compact(done)} {self.unit}", note]))
        self._bar.update(self._workers[name], completed=done, total=total, line=line)

    def close(self) -> None:
        """Take the bars away."""
        if self._bar:
            self._bar.stop()

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _percent(self) -> str:
        return f"{100 * self._done // self.total}% " if self.total else ""

    def _line(self) -> str:
        elapsed = max(time.monotonic() - self._began, 1e-9)
        speed = (self._done - (self._first or 0)) / elapsed
        parts = [f"{compact(self._done)}{f'/{compact(self.total)}' if self.total is not None else ''} {self.unit}"]
        parts += [self._note] if self._note else [f"{compact(speed)} {self.unit}/s"] if speed > 0 else []
        if self.total and speed > 0:
            parts.append(f"ETA {duration((self.total - self._done) / speed)}")
        return ", ".join(parts)


def _bar() -> Progress:
    """Text keeps its width, and the bar gives way in a narrow terminal."""
    return Progress(
        TextColumn("{task.description}", table_column=Column(no_wrap=True)),
        BarColumn(bar_width=None, table_column=Column(ratio=1, max_width=LONGEST_BAR)),
        TextColumn("{task.percentage:>3.0f}%", table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[line]}", table_column=Column(no_wrap=True)),
        console=Console(stderr=True),
        transient=True,
        expand=True,
    )


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
