"""Whole shards fetched before their turn: what a loader will read is known, so the network need not wait for it."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

Turn = tuple[list[np.ndarray], int]
"""The rows of a batch, each the indices of its samples, and the batches that are done after it."""

_SIDE_BY_SIDE = 2
"""Shards fetched at a time; each is read in parts side by side."""


def reading_ahead(
    turns: Iterator[Turn], shard_of: np.ndarray, fetch: Callable[[int], None], most: int
) -> Iterator[Turn]:
    """``turns`` as they are; meanwhile ``fetch`` is called, in threads, with each shard in the order of its first use.

    Args:
        turns: of a loader.
        shard_of: the shard of each sample.
        fetch: must not raise.
        most: shards that are fetched, or being fetched, before a turn has come to them.
    """
    looked_at: deque[tuple[Turn, set[int]]] = deque()
    asked: set[int] = set()
    waiting: set[int] = set()
    pool = ThreadPoolExecutor(_SIDE_BY_SIDE, thread_name_prefix="shard-fetcher")
    try:
        ended = False
        while True:
            while not ended and (not looked_at or len(waiting) < most):
                turn = next(turns, None)
                if turn is None:
                    ended = True
                    break
                shards = {int(number) for row in turn[0] for number in shard_of[row]}
                for number in sorted(shards - asked):
                    pool.submit(fetch, number)
                    waiting.add(number)
                asked |= shards
                looked_at.append((turn, shards))
            if not looked_at:
                return
            turn, shards = looked_at.popleft()
            waiting -= shards
            yield turn
    finally:
        if not sys.is_finalizing():
            pool.shutdown(wait=False, cancel_futures=True)
