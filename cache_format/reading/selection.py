"""Which samples a loader gives, and how many tokens of each: max_length, trim, filter, split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from cache_format.errors import InputError, NothingLeftError
from cache_format.layout.index import Index
from cache_format.reading.batch_source import BatchSource

Filter = Callable[[Index], np.ndarray]
Split = tuple[str, float]

_BUCKETS = 10**9
"""Samples are divided into so many by their sample_id: shares of 9 decimals add up."""


@dataclass(frozen=True, slots=True)
class Selection:
    """What is read in an epoch."""

    samples: np.ndarray
    """int64: indices, ascending"""
    lengths: np.ndarray
    """int64 ``[len(source)]``: tokens taken of each sample of the source"""


def select(
    source: BatchSource, max_length: int | None, trim: bool, filter: Filter | None, split: Split | None
) -> Selection:
    """The samples that the options of a loader leave, see ``FeatureCache.loader``.

    Raises:
        NothingLeftError: they leave none.
        InputError: an option cannot be.
        CacheError: the prepared samples are missing or damaged (asked only where samples are cut or trimmed).
    """
    total = len(source)
    lengths = np.asarray(source.index.num_tokens, np.int64)
    learned = np.asarray(source.index.num_loss_tokens)
    keep = np.ones(total, bool) if split is None else _in_split(np.asarray(source.index.sample_id), split)
    if max_length is not None:
        lengths = np.minimum(lengths, max_length)
    if trim or (filter is not None and max_length is not None):
        lengths, learned = _cut(source, lengths, learned, trim)
        keep &= lengths > 0
    if filter is not None:
        keep &= _filtered(filter, replace(source.index, num_tokens=lengths, num_loss_tokens=learned), total)
    samples = np.flatnonzero(keep)
    if total and not len(samples):
        raise NothingLeftError(f"loader: {_told(filter, split, trim)} leaves none of the {total:,} samples")
    return Selection(samples, lengths)


def _cut(source: BatchSource, lengths: np.ndarray, learned: np.ndarray, trim: bool) -> tuple[np.ndarray, np.ndarray]:
    """Lengths and learned tokens of samples that are cut, or trimmed to their last learned token."""
    asked = np.arange(len(source)) if trim else np.flatnonzero(lengths < source.index.num_tokens)
    counts, ends = source.learned(asked, lengths[asked])
    learned, lengths = learned.copy(), lengths.copy()
    learned[asked] = counts
    if trim:
        lengths[asked] = ends
    return lengths, learned


def _filtered(filter: Filter, index: Index, total: int) -> np.ndarray:
    keep = np.asarray(filter(index))
    if keep.dtype != bool or keep.shape != (total,):
        raise InputError(
            f"loader: filter= gave {keep.dtype} {list(keep.shape)}; it must give a bool for each of the {total:,} "
            "samples, such as lambda index: index.num_loss_tokens >= 16"
        )
    return keep


def _in_split(sample_ids: np.ndarray, split: Split) -> np.ndarray:
    try:
        name, share = split
        bound = round(float(share) * _BUCKETS)
    except (TypeError, ValueError):
        name, bound = "", 0
    if name not in ("train", "validation") or not 0 < bound < _BUCKETS:
        raise InputError(
            f'loader: split={split!r}; write such as ("train", 0.98) in one loader, ("validation", 0.02) in the other'
        )
    bucket = _mixed(sample_ids) % np.uint64(_BUCKETS)
    return bucket < bound if name == "train" else bucket >= _BUCKETS - bound


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """SplitMix64 (Steele et al., 2014) of each number: neighbours have nothing in common."""
    mixed = numbers.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


def _told(filter: Filter | None, split: Split | None, trim: bool) -> str:
    given = [("filter=", filter is not None), (f"split={split!r}", split is not None), ("trim=True", trim)]
    return " with ".join(name for name, is_given in given if is_given) or "the cache"
