"""Which samples a report looks at, and which of their tokens: spread over shards and lengths, the same every time."""

from __future__ import annotations

import numpy as np

from cache_format.layout.index import Index

MOST_SHARDS = 128
"""Shards that samples are taken from at most: each costs an opened file, or at a URL a request or two."""

MOST_TOKENS = 32
"""Tokens of a sample whose states are looked at."""


def choose_samples(index: Index, count: int, seed: int = 0) -> np.ndarray:
    """Positions in ``index``, int64, of about ``count`` samples, shard after shard in random order.

    Each of at most 128 random shards gives the same share of its samples, at least one; all of them if ``count`` asks
    for more than there are.
    """
    if count >= len(index):
        return np.lexsort((index.row_start, index.shard)).astype(np.int64)
    rng = np.random.default_rng(seed)
    order = np.lexsort((index.row_start, index.shard))
    numbers, starts = np.unique(index.shard[order], return_index=True)
    by_shard = np.split(order, starts[1:])
    taken = rng.permutation(len(numbers))[: min(MOST_SHARDS, count)]
    there = sum(len(by_shard[shard]) for shard in taken)
    share = min(1.0, count / there)
    chosen = []
    for shard in taken:
        of_it = by_shard[shard]
        some = max(1, round(share * len(of_it)))
        chosen.append(np.sort(rng.choice(len(of_it), some, replace=False)))
        chosen[-1] = of_it[chosen[-1]]
    return np.concatenate(chosen)[:count].astype(np.int64)


def choose_tokens(num_tokens: int) -> np.ndarray:
    """Ascending places, int64, of at most 32 tokens of a sample: half spread evenly, half closer at its beginning."""
    even = np.linspace(0, num_tokens - 1, MOST_TOKENS // 2)
    closer = np.geomspace(1, num_tokens, MOST_TOKENS // 2) - 1
    return np.unique(np.concatenate([even, closer]).round().astype(np.int64))
