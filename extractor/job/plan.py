"""The plan: which samples go into which shard, in which order and batches. A pure function of lengths and options.

Padding is kept low by giving a shard samples of nearly equal length: all samples are sorted by length and cut into
shards by bytes. Shard numbers then step through the sorted order with a stride near the golden ratio, so that any
run of consecutive shards (a partial cache, a reader's window) has short and long samples alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cache_format.layout.shard_layout import ShardSchema
from extractor.config import PlanOptions

HEAD_SLACK_BYTES = 16 << 10
"""Room left in every shard for its header and page alignment."""

PLAN_VERSION = 1
"""Part of the identity: raised when the same samples and options would be planned in another way."""

MAX_PADDING = 0.02

SAMPLE_HEAD_BYTES = 24
"""cu_seqlens, sample_ids and sample_checksums: 8 bytes each a sample."""


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One shard: the unit of work."""

    number: int
    sample_ids: np.ndarray
    """int64 ``[n]``, in the order of the rows: longest first, equal lengths by sample_id"""
    num_tokens: np.ndarray
    """int64 ``[n]``"""
    batches: tuple[slice, ...]
    """positions in ``sample_ids`` that make up each forward pass"""

    @property
    def tokens(self) -> int:
        """Real tokens."""
        return int(self.num_tokens.sum())

    @property
    def padded_tokens(self) -> int:
        """Tokens that the target computes, padding included."""
        return sum(int(self.num_tokens[b.start]) * (b.stop - b.start) for b in self.batches)


class Plan:
    """All shards of a cache; a shard's details are worked out when it is asked for."""

    def __init__(self, num_tokens: np.ndarray, raw_token_bytes: int, options: PlanOptions):
        """``num_tokens`` int ``[N]``: length of each prepared sample; ``raw_token_bytes``: stored bytes a token before
        the codec, so that a cache and its recoded copies have the same shards.

        Raises:
            ValueError: ``options.batch_tokens`` is not yet a number.
        """
        if options.batch_tokens is None:
            raise ValueError("a plan needs a number of batch_tokens")
        self.batch_tokens = options.batch_tokens
        self._num_tokens = np.asarray(num_tokens, np.int64)
        self._order = np.argsort(-self._num_tokens, kind="stable").astype(np.int64)
        self._bounds = _cut(self._num_tokens[self._order], raw_token_bytes, options.shard_bytes - HEAD_SLACK_BYTES)
        self._stride = _stride(self.num_shards)

    @property
    def num_shards(self) -> int:
        """Shards in the cache."""
        return len(self._bounds) - 1

    def __len__(self) -> int:
        return self.num_shards

    def __iter__(self) -> Iterator[ShardPlan]:
        return (self.shard(number) for number in range(self.num_shards))

    def shard(self, number: int) -> ShardPlan:
        """Shard ``number``: its samples and batches."""
        ids, lengths = self.samples_of(number)
        return ShardPlan(number, ids, lengths, tuple(batches(lengths, self.batch_tokens)))

    def samples_of(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """``sample_ids`` and ``num_tokens`` of shard ``number``, as in its plan, without working out batches."""
        place = number * self._stride % self.num_shards
        ids = self._order[self._bounds[place] : self._bounds[place + 1]]
        return ids, self._num_tokens[ids]

    @property
    def most_batch_tokens(self) -> int:
        """No batch has more real tokens: a longer sample is a batch of its own, and no batch is larger than a shard."""
        return min(max(self.batch_tokens, int(self._num_tokens.max())), self.largest_shard_tokens)

    @property
    def largest_shard_tokens(self) -> int:
        """Tokens of the largest shard, whatever ``batch_tokens`` is."""
        ends = np.concatenate([[0], np.cumsum(self._num_tokens[self._order])])
        return int(np.diff(ends[self._bounds]).max())

    def shard_bytes(self, schema: ShardSchema) -> np.ndarray:
        """int64 ``[num_shards]``: file size of each shard, by number; exact but where it depends on the states."""
        ends = np.concatenate([[0], np.cumsum(self._num_tokens[self._order])])
        sizes = np.empty(self.num_shards, np.int64)
        for number in range(self.num_shards):
            low, high = self._bounds[number * self._stride % self.num_shards :][:2]
            sizes[number] = schema.num_bytes(number, int(high - low), int(ends[high] - ends[low]))
        return sizes


def batches(num_tokens: np.ndarray, batch_tokens: int) -> Iterator[slice]:
    """Cut samples, longest first, into runs of at most ``batch_tokens`` padded tokens and at least one sample.

    A run also ends where the next sample would bring its padding over 2 %, once it has a quarter of the budget: such a
    batch keeps a device busy, and the next ones pad less.
    """
    start = 0
    while start < len(num_tokens):
        longest, stop, real = int(num_tokens[start]), start + 1, int(num_tokens[start])
        while stop < len(num_tokens) and longest * (stop - start + 1) <= batch_tokens:
            with_next = real + int(num_tokens[stop])
            if real * 4 >= batch_tokens and with_next < (1 - MAX_PADDING) * longest * (stop - start + 1):
                break
            stop, real = stop + 1, with_next
        yield slice(start, stop)
        start = stop


def _cut(num_tokens: np.ndarray, token_bytes: int, shard_bytes: int) -> np.ndarray:
    """Bounds ``[num_shards + 1]`` of runs that fit into ``shard_bytes``."""
    ends = np.cumsum(num_tokens * token_bytes + SAMPLE_HEAD_BYTES)
    bounds = [0]
    while bounds[-1] < len(num_tokens):
        start = bounds[-1]
        before = int(ends[start - 1]) if start else 0
        stop = int(np.searchsorted(ends, before + shard_bytes, side="right"))
        bounds.append(max(stop, start + 1))
    return np.asarray(bounds, np.int64)


def _stride(count: int) -> int:
    """A step near ``count`` / golden ratio that visits all of 0 .. ``count`` - 1."""
    stride = max(1, round(count * (math.sqrt(5) - 1) / 2))
    while math.gcd(stride, count) != 1 and stride > 1:
        stride -= 1
    return stride
