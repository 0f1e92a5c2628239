"""Several caches read as one: their samples one after the other, in one order of an epoch."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import fields
from typing import Any

import numpy as np

from cache_format.batch import DFlashTargetBatch
from cache_format.errors import InputError, MismatchError
from cache_format.layout.index import Index
from cache_format.layout.manifest import differing
from cache_format.reading.batch_source import BatchSource
from cache_format.reading.expect import target_identity
from cache_format.reading.gather import Piece
from cache_format.reading.view import View


class JoinedCaches(BatchSource):
    """A source of several. Shards are numbered on from cache to cache."""

    def __init__(self, parts: Sequence[BatchSource], weights: Sequence[float] | None = None):
        """
        Args:
            parts: of the same target, layers, dtype and captures; their codecs may differ.
            weights: see ``FeatureCache.open``.

        Raises:
            MismatchError: two do not go together; names both, and how they differ.
            InputError: no cache, or weights that cannot be.
        """
        self._parts = tuple(itertools.chain.from_iterable(part.parts for part in parts))
        if not self.parts:
            raise InputError("give at least one cache")
        for part in self.parts[1:]:
            require_alike(self.parts[0], part)
        self.weights = None if weights is None else _checked(weights, [len(part.parts) for part in parts])
        first = self.parts[0]
        self.manifest, self.stored, self.schema, self.view = first.manifest, first.stored, first.schema, first.view
        self.where = ", ".join(part.where for part in self.parts)
        listed = "\n".join(part.fingerprint for part in self.parts)
        self.fingerprint = hashlib.sha256(listed.encode()).hexdigest()
        self.starts = np.cumsum([0, *(len(part) for part in self.parts)])
        counts = [int(part.index.shard.max(initial=-1)) + 1 for part in self.parts]
        self.shard_starts = np.cumsum([0, *counts])
        self.index = _joined_index(self.parts, self.shard_starts)

    def __reduce__(self) -> tuple[Any, ...]:
        return JoinedCaches, (self.parts, self.weights)

    def viewed(self, view: View) -> JoinedCaches:
        """See :class:`BatchSource`."""
        return JoinedCaches([part.viewed(view) for part in self.parts], self.weights)

    @property
    def parts(self) -> Sequence[BatchSource]:
        """See :class:`BatchSource`."""
        return self._parts

    @property
    def readers(self) -> Executor | None:
        """See :class:`BatchSource`."""
        return next((part.readers for part in self.parts if part.readers is not None), None)

    @property
    def decodes_on_host(self) -> bool:
        """See :class:`BatchSource`."""
        return any(part.schema.codec != self.schema.codec for part in self.parts)

    def sample(self, i: int) -> DFlashTargetBatch:
        """See :class:`BatchSource`."""
        part, there = self._place(i)
        return part.sample(there)

    def piece(self, i: int, length: int, row: int, at: int) -> Piece:
        """See :class:`BatchSource`."""
        part, there = self._place(i)
        return part.piece(there, length, row, at)

    def open_shards(self, samples: Sequence[int]) -> None:
        """See :class:`BatchSource`."""
        for part, of_part in itertools.groupby(sorted(samples), key=lambda i: self._place(i)[0]):
            if part.readers is not None:
                part.open_shards([self._place(i)[1] for i in of_part])

    def learned(self, samples: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See :class:`BatchSource`."""
        counts, ends = np.zeros(len(samples), np.int64), np.zeros(len(samples), np.int64)
        for number, part in enumerate(self.parts):
            first, stop = self.starts[number], self.starts[number + 1]
            of_part = np.flatnonzero((first <= samples) & (samples < stop))
            if len(of_part):
                counts[of_part], ends[of_part] = part.learned(samples[of_part] - first, lengths[of_part])
        return counts, ends

    def learned_counts(self) -> np.ndarray:
        """See :class:`BatchSource`."""
        return np.sum([part.learned_counts() for part in self.parts], axis=0)

    def most_ahead(self, window_shards: int) -> int | None:
        """See :class:`BatchSource`."""
        found = [most for part in self.parts if (most := part.most_ahead(window_shards)) is not None]
        return min(found, default=None)

    def read_ahead(self, shard: int) -> None:
        """See :class:`BatchSource`."""
        number = int(np.searchsorted(self.shard_starts, shard, side="right")) - 1
        self.parts[number].read_ahead(shard - int(self.shard_starts[number]))

    def _place(self, i: int) -> tuple[BatchSource, int]:
        if not -len(self) <= i < len(self):
            raise IndexError(f"sample {i} is outside 0..{len(self) - 1}")
        i = i % len(self)
        number = int(np.searchsorted(self.starts, i, side="right")) - 1
        return self.parts[number], i - int(self.starts[number])


def require_alike(one: BatchSource, other: BatchSource) -> None:
    """Refuse caches whose batches cannot stand in for each other.

    Raises:
        MismatchError: names both caches and each field that differs.
    """
    different = differing(_decides(one), _decides(other))
    if different:
        raise MismatchError(
            f"{one.where} and {other.where} do not go together. Different (the first, then the second):",
            different,
            "Read them apart, or extract one of them again with the other's options.",
        )


def _decides(source: BatchSource) -> dict[str, Any]:
    manifest = source.manifest
    names = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
    return {
        **{name: getattr(manifest.target, name) for name in names},
        **target_identity(source.stored),
        "target_layer_ids": manifest.target_layer_ids,
        "dtype": manifest.dtype,
        "capture": manifest.capture,
    }


def _checked(weights: Sequence[float], parts: Sequence[int]) -> list[float]:
    given = list(weights)
    if len(given) != len(parts):
        raise InputError(f"weights={given}: give one for each of the {len(parts)} caches")
    if any(isinstance(w, bool) or not isinstance(w, int | float) or not 0 < w < float("inf") for w in given):
        raise InputError(f"weights={given}: each is a number above 0, how often a sample comes in an epoch")
    return [float(weight) for weight, count in zip(given, parts, strict=True) for _ in range(count)]


def _joined_index(parts: Sequence[BatchSource], shard_starts: np.ndarray) -> Index:
    columns = {f.name: np.concatenate([getattr(part.index, f.name) for part in parts]) for f in fields(Index)}
    of_part = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    columns["shard"] = columns["shard"] + shard_starts[of_part].astype(np.int32)
    return Index(**columns)
