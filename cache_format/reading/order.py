"""(seed, epoch, lengths, shards) -> order -> batches -> whose turn: pure functions, the same on every rank and machine.

An epoch is one global list of batches. Step s of W ranks takes the next W of them, one a rank, so the number of batches
done says where an epoch stands for any number of ranks: a run stopped on 8 ranks goes on with 5, nothing repeated and
nothing skipped.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cache_format.errors import NothingLeftError

SHUFFLES = ("full", "window")

POOL_SAMPLES = 4096
"""Samples of like length, or that fill a row, are looked for among this many neighbours in the shuffled order."""


@dataclass(frozen=True, slots=True)
class Batches:
    """The batches of one epoch: a batch is a run of rows, a row is a run of samples (one, unless packed)."""

    samples: np.ndarray
    """int64: sample indices, row after row"""
    row_starts: np.ndarray
    """int64, rows + 1: where each row begins in ``samples``"""
    batch_starts: np.ndarray
    """int64, batches + 1: where each batch begins among the rows"""
    row_sizes: np.ndarray | None = None
    """int: tokens of each row, where a batch is limited by its padded tokens; None: rows count alike"""

    def __len__(self) -> int:
        return len(self.batch_starts) - 1

    def rows(self, start: int, stop: int) -> list[np.ndarray]:
        """The rows of batches ``start`` to ``stop``, each the indices of its samples."""
        first, last = self.batch_starts[start], self.batch_starts[stop]
        return [
            self.samples[a:b]
            for a, b in zip(self.row_starts[first:last], self.row_starts[first + 1 : last + 1], strict=True)
        ]


def random_source(seed: int, epoch: int) -> np.random.Generator:
    """The randomness of one epoch."""
    return np.random.default_rng([seed, epoch])


def full_order(count: int, rng: np.random.Generator) -> np.ndarray:
    """All of ``count`` samples in random order."""
    return rng.permutation(count)


def window_order(shards: np.ndarray, window_shards: int, rng: np.random.Generator) -> np.ndarray:
    """Shards in random order, the samples of each ``window_shards`` of them mixed: few shards are read at a time.

    Args:
        shards: ``[n]`` the shard of each sample.
        window_shards: shards of a window.
    """
    numbers, group = np.unique(shards, return_inverse=True)
    window = (rng.permutation(len(numbers)) // window_shards)[group]
    mixed = rng.permutation(len(shards))
    return mixed[np.argsort(window[mixed], kind="stable")]


def weighted(samples: np.ndarray, weight: float, seed: int, epoch: int, part: int, shuffled: bool) -> np.ndarray:
    """``weight * n`` of ``samples [n]`` (at least one), whichever are their turn in this epoch.

    Epochs take turns along an endless run of all samples in random order, then again, and so on: a sample comes
    ``weight`` times an epoch, and no sample a second time more often than another before each has had its turn.

    Args:
        samples: of one cache.
        weight: how often a sample comes in an epoch, on average.
        seed: of the shuffle.
        epoch: whose turn.
        part: number of the cache among those read together.
        shuffled: False: each run is in the order of ``samples``.
    """
    if not len(samples):
        return samples
    count = max(1, round(weight * len(samples)))
    first, stop = epoch * count, (epoch + 1) * count
    runs = []
    for run in range(first // len(samples), -(-stop // len(samples))):
        mixed = np.random.default_rng([seed, run, part]).permutation(len(samples)) if shuffled else slice(None)
        runs.append(samples[mixed])
    skipped = first // len(samples) * len(samples)
    return np.concatenate(runs)[first - skipped : stop - skipped]


def batches_by_count(order: np.ndarray, batch_size: int, drop_last: bool) -> Batches:
    """``batch_size`` samples a batch; the last may have fewer, or is left out."""
    return Batches(order, np.arange(len(order) + 1), _starts(len(order), batch_size, drop_last))


def batches_by_tokens(
    order: np.ndarray, lengths: np.ndarray, batch_tokens: int, rng: np.random.Generator | None
) -> Batches:
    """Batches of at most ``batch_tokens`` tokens, padding included; samples of like length go together.

    The order is cut into pools of ``POOL_SAMPLES``; a pool is sorted by length and cut into batches, which come in
    random order. Measured on 50,000 log-normal lengths: 2 % padding; no trend of length between neighbouring batches
    nor over the epoch; a sample is at most 4,096 from where the full shuffle had it.

    Args:
        order: ``[n]`` sample indices.
        lengths: ``[n]`` tokens of each sample, by index; none above ``batch_tokens``.
        rng: None: a pool's batches come in the order of their first samples.
    """
    sorted_pools, starts = [], []
    for first in range(0, len(order), POOL_SAMPLES):
        pool = order[first : first + POOL_SAMPLES]
        places = np.argsort(lengths[pool], kind="stable")
        pool = pool[places]
        cuts = np.array(list(_cut_by_tokens(lengths[pool], batch_tokens)))
        first_places = np.minimum.reduceat(places, cuts[:-1])
        turns = np.argsort(first_places) if rng is None else rng.permutation(len(first_places))
        pieces = [pool[cuts[turn] : cuts[turn + 1]] for turn in turns]
        sorted_pools += pieces
        starts += [len(piece) for piece in pieces]
    samples = np.concatenate([np.empty(0, np.int64), *sorted_pools])
    return Batches(samples, np.arange(len(samples) + 1), _cumulative(starts), lengths[samples])


def batches_of_packed_rows(
    order: np.ndarray, lengths: np.ndarray, pack_to: int, batch_size: int, drop_last: bool
) -> Batches:
    """``batch_size`` rows a batch, the last as for :func:`batches_by_count`; samples of together at most ``pack_to``
    tokens a row.

    Pools of ``POOL_SAMPLES`` are packed longest first, each sample into the fullest row that still takes it (best fit
    decreasing); the rows of a pool follow the order of their first samples.
    """
    rows: list[list[int]] = []
    for first in range(0, len(order), POOL_SAMPLES):
        rows += _pack(order[first : first + POOL_SAMPLES], lengths, pack_to)
    samples = np.array([sample for row in rows for sample in row], np.int64)
    return Batches(samples, _cumulative([len(row) for row in rows]), _starts(len(rows), batch_size, drop_last))


def num_steps(batches: Batches, done: int, world_size: int, drop_last: bool) -> int:
    """Steps left to each rank after ``done`` batches; the same on every rank, so that collectives never hang."""
    full, rest = divmod(len(batches) - done, world_size)
    if not rest or drop_last:
        return full
    return full + (_rows_in(batches, len(batches) - rest) >= world_size)


def batch_rows(
    batches: Batches, done: int, step: int, rank: int, world_size: int, drop_last: bool
) -> tuple[list[np.ndarray], int]:
    """The rows of one rank in one step, and how many batches of the epoch are done after it.

    The remainder: if the last step has fewer batches than ranks, their rows are divided anew over the ranks. If these
    are even fewer than ranks, they are divided together with the step before. Either way the largest share is as small
    as can be: in rows; in padded tokens for a token budget, which only the second way can exceed, by about a row. With
    ``drop_last`` an incomplete last step is left out.
    """
    start, total = done + step * world_size, len(batches)
    stop = start + world_size
    joined = not drop_last and stop < total < stop + world_size and _rows_in(batches, stop) < world_size
    if stop > total or joined:
        return _share(batches, start, rank, world_size), total
    return batches.rows(start + rank, start + rank + 1), stop


def left_out(batches: Batches, done: int, world_size: int) -> int:
    """Rows that no step can take: fewer than ranks are left, and no step before that they could join (a resume)."""
    rest = len(batches) - done
    return _rows_in(batches, done) if 0 < rest < world_size and _rows_in(batches, done) < world_size else 0


def require_rows(batches: Batches, world_size: int, drop_last: bool) -> None:
    """Every rank needs something to do.

    Raises:
        NothingLeftError: fewer rows than ranks, or ``drop_last`` leaves out all there is.
    """
    rows = _rows_in(batches, 0)
    if rows < world_size:
        raise NothingLeftError(
            f"{rows:,} samples or packed rows cannot be divided over {world_size} ranks; "
            "use fewer ranks, a wider filter, or a larger cache"
        )
    if not num_steps(batches, 0, world_size, drop_last):
        raise NothingLeftError(
            f"{len(batches):,} whole batches do not make one step of {world_size} ranks, and drop_last=True leaves out "
            "the rest; use smaller batches, fewer ranks, or drop_last=False"
        )


def _rows_in(batches: Batches, start: int) -> int:
    return int(batches.batch_starts[-1] - batches.batch_starts[start])


def _share(batches: Batches, start: int, rank: int, world_size: int) -> list[np.ndarray]:
    """One rank's part of all rows from batch ``start`` on."""
    rows = batches.rows(start, len(batches))
    if batches.row_sizes is None:
        return rows[len(rows) * rank // world_size : len(rows) * (rank + 1) // world_size]
    sizes = batches.row_sizes[batches.batch_starts[start] :]
    by_size = np.argsort(-sizes.astype(np.int64), kind="stable")
    cuts = _even_cuts(sizes[by_size], world_size)
    return [rows[i] for i in by_size[cuts[rank] : cuts[rank + 1]]]


def _even_cuts(descending: np.ndarray, parts: int) -> list[int]:
    """Cut sizes sorted descending into ``parts`` runs, none empty, whose largest padded one is as small as can be."""

    def cuts(limit: int) -> list[int] | None:
        found = [0]
        for parts_after in range(parts - 1, -1, -1):
            at = found[-1]
            room = limit // int(descending[at])
            if not room:
                return None
            found.append(min(at + room, len(descending) - parts_after))
        return found if found[-1] == len(descending) else None

    low, high = 1, int(descending[0]) * len(descending)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if cuts(middle) else (middle + 1, high)
    best = cuts(low)
    assert best is not None
    return best


def _starts(count: int, size: int, drop_last: bool) -> np.ndarray:
    whole = np.arange(0, count + 1, size)
    return whole if drop_last or whole[-1] == count else np.append(whole, count)


def _cumulative(sizes: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])


def _cut_by_tokens(ascending: np.ndarray, batch_tokens: int) -> Iterator[int]:
    """Where batches begin in lengths sorted ascending, and the end; each fills the budget as far as it can."""
    start = 0
    while start < len(ascending):
        yield start
        most = ascending[start : start + batch_tokens // int(ascending[start])]
        padded = most.astype(np.int64) * np.arange(1, len(most) + 1)
        start += int(np.searchsorted(padded, batch_tokens, side="right"))
    yield start


def _pack(pool: np.ndarray, lengths: np.ndarray, pack_to: int) -> list[list[int]]:
    """Best fit decreasing: rows by their room in a sorted list, so that the fitting one is found by bisection."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []
    for sample in pool[np.argsort(-lengths[pool].astype(np.int64), kind="stable")].tolist():
        length = int(lengths[sample])
        at = bisect_left(room, (length, -1))
        if at == len(room):
            rows.append([])
            left, row = pack_to, len(rows) - 1
        else:
            left, row = room.pop(at)
        rows[row].append(sample)
        entry = (left - length, row)
        room.insert(bisect_left(room, entry), entry)
    place = {sample: i for i, sample in enumerate(pool.tolist())}
    return sorted(rows, key=lambda row: place[row[0]])
