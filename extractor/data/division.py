"""How the parts of the prepared samples are divided over the workers of a job, none of which waits for another.

Part n is first made by worker n % world_size. The leading worker then makes what is not there yet, from the last part
backwards, as the others come from the front: so a worker that is slow, dead or never came costs time and nothing else.
A part depends on its rows alone, so one that two of them make is the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass


def _nothing(_number: int) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Division:
    """A worker's part in preparing; all of it by default."""

    rank: int = 0
    """0 leads"""
    world_size: int = 1
    local_size: int = 1
    """workers that share the cores of this machine"""
    wanted: Callable[[], bool] = lambda: True
    """asked before each part: whether anybody still needs one"""
    bring: Callable[[int], None] = _nothing
    """have the part of this number in the folder if another worker has made it elsewhere"""
    made: Callable[[int], None] = _nothing
    """called with the number of each part that is made"""

    def order(self, parts: int) -> list[int]:
        """Numbers of the parts that this worker makes unless they are there by then, in its order."""
        own = list(range(self.rank, parts, self.world_size))
        others = set() if self.rank else set(range(parts)) - set(own)
        return own + sorted(others, reverse=True)

    def share(self, parts: int) -> list[int]:
        """Numbers of the parts whose files in the folder this worker looks at before it begins."""
        return list(range(self.rank, parts, self.world_size)) if self.rank else list(range(parts))

    def processes(self, rows: int | None, rows_worth_one: int) -> int:
        """How many processes make ``rows`` rows that all workers share (None: nobody knows how many)."""
        cores = max(1, len(os.sched_getaffinity(0)) // self.local_size)
        return cores if rows is None else max(1, min(cores, rows // self.world_size // rows_worth_one))


ALL = Division()
