"""Shards handed out one at a time to whoever is free; those of a worker that died go back, and not for ever."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable

from cache_format.errors import DFlashCacheError

MAX_TRIES = 3
"""Workers that a shard may cost before the job gives up on it."""


class WorkerError(DFlashCacheError):
    """Workers died, and the job cannot do without them."""


class ShardQueue:
    """The shards still to be made, in order; it knows their numbers and nothing else of them."""

    def __init__(self, numbers: Iterable[int]):
        self._waiting = deque(numbers)
        self._tries: Counter[int] = Counter()
        self._out: set[int] = set()

    def __bool__(self) -> bool:
        """Whether any shard is not made yet."""
        return bool(self._waiting or self._out)

    def take(self) -> int | None:
        """The next shard to make; None: all are made or in work."""
        if not self._waiting:
            return None
        number = self._waiting.popleft()
        self._out.add(number)
        return number

    def made(self, number: int) -> None:
        """It is committed."""
        self._out.remove(number)

    def lost(self, number: int, reason: str) -> None:
        """Whoever had it is gone; it comes next.

        Raises:
            WorkerError: it has been tried often enough.
        """
        self._out.remove(number)
        self._tries[number] += 1
        if self._tries[number] >= MAX_TRIES:
            raise WorkerError(
                f"shard {number} was begun {MAX_TRIES} times and each time its worker failed; the last time: {reason}. "
                "Finished shards are kept; run the same command again once the cause is mended."
            )
        self._waiting.appendleft(number)
