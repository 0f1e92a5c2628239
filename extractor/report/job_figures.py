"""How the job went: shards by size and by the time of their commit, padding; pure functions of what is known of shards.

A cache holds no times: its bytes are the same whoever makes it, and when. The files' own times tell when each shard
was committed, as long as they were not copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cache_format.layout.index import Index
from extractor.job.plan import batches

TIME_BINS, SIZE_BINS = 60, 24
LEAST_COMMITS = 4
SHARDS_A_BIN = 4
"""At least, in the mean: fewer would show the shards' sizes, not the speed."""

PAUSE_TIMES, PAUSE_SECONDS = 20, 60.0
"""A gap between two commits is a pause where it is longer than both: so many times the median gap, so many seconds."""

MOST_SHARDS_BATCHED = 100


@dataclass(frozen=True, kw_only=True)
class Pause:
    """A time in which no shard was committed: the job stood, or was stopped."""

    after: float
    """seconds from the first commit"""
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Tokens committed over time, from the first commit (whose shard is not counted: it began earlier)."""

    began: float
    """seconds since 1970, of the first commit"""
    seconds: float
    """to the last commit"""
    rates: list[float]
    """tokens a second in equal ranges of that time"""
    pauses: list[Pause]
    """longest first"""

    @property
    def rate(self) -> float:
        """Tokens a second without the pauses."""
        working = self.seconds - sum(pause.seconds for pause in self.pauses)
        return sum(self.rates) * self.seconds / max(len(self.rates), 1) / max(working, 1e-9)


@dataclass(frozen=True, kw_only=True)
class JobFigures:
    """What is known of the job without its log."""

    shards: int
    """finished"""
    planned_shards: int
    bytes: int
    """of finished shards"""
    size_edges: list[float]
    sizes: list[int]
    """shards by bytes, at ``size_edges``"""
    padding: float | None
    """share of computed tokens that was padding; None where the cache does not say how its batches were made"""
    throughput: Throughput | None
    """None where the times are not known or too few"""
    why_no_throughput: str
    created_with: dict[str, str]
    """software and hardware of the run that began the cache"""


def throughput(times: np.ndarray, tokens: np.ndarray) -> Throughput | None:
    """Of shards committed at ``times`` (seconds since 1970) with so many ``tokens``; None where they are too few.

    Shards of several workers are added up.
    """
    if len(times) < LEAST_COMMITS or np.ptp(times) <= 0:
        return None
    order = np.argsort(times, kind="stable")
    since, tokens = times[order] - times[order[0]], tokens[order]
    gaps = np.diff(since)
    long = gaps > max(PAUSE_TIMES * float(np.median(gaps)), PAUSE_SECONDS)
    bins = max(1, min(TIME_BINS, (len(since) - 1) // SHARDS_A_BIN))
    counts, _ = np.histogram(since[1:], bins, (0, since[-1]), weights=tokens[1:].astype(float))
    pauses = [Pause(after=float(since[at]), seconds=float(gaps[at])) for at in np.flatnonzero(long)]
    return Throughput(
        began=float(times[order[0]]),
        seconds=float(since[-1]),
        rates=(counts * bins / since[-1]).tolist(),
        pauses=sorted(pauses, key=lambda pause: -pause.seconds),
    )


def padding(index: Index, batch_tokens: int) -> float:
    """Share of padding in the batches that ``index``'s samples were run in; of at most 100 shards, evenly chosen.

    Samples of a shard are stored in the order in which they were run, so their batches follow from their lengths.
    """
    order = np.lexsort((index.row_start, index.shard))
    _, starts = np.unique(index.shard[order], return_index=True)
    by_shard = np.split(index.num_tokens[order].astype(np.int64), starts[1:])
    some = np.unique(np.linspace(0, len(by_shard) - 1, min(len(by_shard), MOST_SHARDS_BATCHED)).astype(int))
    real = computed = 0
    for lengths in (by_shard[number] for number in some):
        real += int(lengths.sum())
        computed += sum(int(lengths[b.start]) * (b.stop - b.start) for b in batches(lengths, batch_tokens))
    return 1 - real / max(computed, 1)


def tokens_of(index: Index, shards: Sequence[int]) -> np.ndarray:
    """float64: tokens of each of ``shards``, as the index counts them; 0 for one that it does not name."""
    numbers, where = np.unique(index.shard, return_inverse=True)
    counted = dict(zip(numbers.tolist(), np.bincount(where, index.num_tokens).tolist(), strict=True))
    return np.asarray([counted.get(number, 0.0) for number in shards])


def size_histogram(sizes: np.ndarray) -> tuple[list[float], list[int]]:
    """Edges and counts of shard sizes (bytes), from 0."""
    counts, edges = np.histogram(sizes, SIZE_BINS, (0, max(int(sizes.max(initial=0)), 1)))
    return edges.tolist(), counts.tolist()
