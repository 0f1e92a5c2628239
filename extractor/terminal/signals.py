"""SIGTERM and SIGINT (Slurm preemption, Ctrl-C): stop soon, lose no finished shard, leave with a code that says so."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

GRACE_SECONDS = 9.0
"""The process is gone this long after the first signal, whatever it was waiting for (a slow disk, a worker)."""


class Stopped(BaseException):
    """Raised in the main thread by the first SIGTERM or SIGINT. Not an Exception: nothing may swallow it."""

    def __init__(self, number: int):
        self.number = number
        super().__init__(f"stopped by {signal.Signals(number).name}")

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells report it: 143 for SIGTERM, 130 for SIGINT."""
        return 128 + self.number


@contextmanager
def stoppable(last_words: str) -> Iterator[None]:
    """Turn the first signal into :class:`Stopped`, at once; the second one, or a delay of 9 s, ends the process.

    Ending at any instant is safe: a file under its final name is whole, and the kernel gives the lock back.
    ``last_words`` then go to stderr; where Stopped is raised, who catches it speaks.
    """
    stopping = False

    def leave(number: int) -> None:
        # Not print: it may be what the main thread is in the middle of.
        with suppress(OSError):
            os.write(2, f"{Stopped(number)}, without waiting; {last_words}\n".encode())
        os._exit(128 + number)

    def handle(number: int, _frame: FrameType | None) -> None:
        nonlocal stopping
        if stopping:
            leave(number)
        stopping = True
        deadline = threading.Timer(GRACE_SECONDS, leave, (number,))
        deadline.daemon = True
        deadline.start()
        raise Stopped(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
