"""Prepared samples: ``samples/samples-00000.arrow``, ... - what the target will be run on, one Arrow IPC file a part.

A part holds the samples that came from a run of consecutive dataset rows, so that preparation can run in several
processes and restart where it stopped. ``sample_id`` is the position over all parts in order: 0 .. N-1.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from cache_format.errors import CacheError
from cache_format.layout.arrow_file import read_batch, write_batch
from cache_format.storage.paths import inside

SCHEMA = pa.schema(
    [
        pa.field("source_row", pa.int64(), nullable=False),
        pa.field("num_loss_tokens", pa.int32(), nullable=False),
        pa.field("digest", pa.uint64(), nullable=False),
        pa.field("input_ids", pa.list_(pa.field("item", pa.int32(), nullable=False)), nullable=False),
        pa.field("loss_mask", pa.list_(pa.field("item", pa.uint8(), nullable=False)), nullable=False),
    ]
)
_META = b"dflash_cache.part"


@dataclass(frozen=True, slots=True)
class Sample:
    """One tokenised sample, unpadded."""

    input_ids: np.ndarray
    """int32 ``[T]``"""
    loss_mask: np.ndarray
    """uint8 ``[T]``: 1 where the draft is trained on the token"""
    source_row: int
    """row of the dataset it was made from"""

    def digest(self) -> int:
        """xxh3_64 over ``T`` as int64, input_ids as int32, loss_mask as uint8, all little-endian (FORMAT.md)."""
        hasher = xxhash.xxh3_64(np.int64(len(self.input_ids)).astype("<i8").tobytes())
        hasher.update(np.ascontiguousarray(self.input_ids, "<i4").data)
        hasher.update(np.ascontiguousarray(self.loss_mask, "u1").data)
        return hasher.intdigest()


@dataclass(frozen=True, slots=True)
class BadRows:
    """Rows that are bad for one reason."""

    rows: int
    first: str
    """file and row in it of the first one, counted from 1: ``train.jsonl row 17``"""

    def __post_init__(self) -> None:
        if not isinstance(self.rows, int) or self.rows < 1 or not isinstance(self.first, str):
            raise ValueError("bad rows have a number of rows and the place of the first one")


class Dropped(Counter[str]):
    """Reason -> rows (of a row that gives several samples: samples) that were left out."""

    bad_rows: dict[str, BadRows]
    """what ``bad_row`` is made of: class of what is wrong with a row -> how many, and the first"""

    noted: Counter[str]
    """what is missing from samples that were kept, such as ``reasoning_left_out`` -> how often"""

    def __init__(
        self,
        counts: Mapping[str, int] | None = None,
        bad_rows: Mapping[str, BadRows] | None = None,
        noted: Mapping[str, int] | None = None,
    ):
        super().__init__(counts or {})
        self.bad_rows = dict(bad_rows or {})
        self.noted = Counter(noted or {})

    def count_bad_row(self, reason: str, where: str) -> None:
        """Count one more, which comes after all that are counted."""
        self["bad_row"] += 1
        self._add(reason, BadRows(1, where))

    def add(self, later: Dropped) -> None:
        """Count those of rows that come after these."""
        self.update(later)
        self.noted.update(later.noted)
        for reason, rows in later.bad_rows.items():
            self._add(reason, rows)

    def _add(self, reason: str, rows: BadRows) -> None:
        before = self.bad_rows.get(reason)
        self.bad_rows[reason] = rows if before is None else BadRows(before.rows + rows.rows, before.first)


@dataclass(frozen=True, slots=True)
class PartInfo:
    """Which dataset rows a part covers, why rows of it were dropped, and what it was made for."""

    first_row: int
    stop_row: int
    dropped: Mapping[str, int]
    made_for: str = ""
    """digest of the data, tokenizer and options that decided the samples; "" in parts of earlier versions"""
    bad_rows: Mapping[str, BadRows] = field(default_factory=dict)
    """see :class:`Dropped`; empty in parts of earlier versions"""
    noted: Mapping[str, int] = field(default_factory=dict)
    """see :class:`Dropped`; empty in parts of earlier versions"""

    def __post_init__(self) -> None:
        counts = (*self.dropped.values(), *self.noted.values())
        whole = all(isinstance(v, int) and v >= 0 for v in (self.first_row, self.stop_row, *counts))
        if not whole or self.stop_row < self.first_row:
            raise ValueError("rows and counts must be whole numbers >= 0, first_row <= stop_row")
        if not isinstance(self.made_for, str):
            raise ValueError("made_for must be text")

    @staticmethod
    def of(first_row: int, stop_row: int, dropped: Dropped, made_for: str) -> PartInfo:
        """The information of a part with all that ``dropped`` counts."""
        return PartInfo(first_row, stop_row, dropped, made_for, dropped.bad_rows, dropped.noted)


def part_path(folder: Path, number: int) -> Path:
    """File of part ``number``."""
    return folder / f"samples-{number:05d}.arrow"


def write_part(path: Path, samples: Sequence[Sample], info: PartInfo) -> None:
    """Commit one part. The bytes depend on the arguments alone.

    Raises:
        StorageError: the operating system refused the write.
    """

    def lists(arrays: list[np.ndarray], dtype: str) -> pa.Array:
        offsets = np.concatenate([[0], np.cumsum([len(a) for a in arrays])]).astype("<i4")
        flat = np.concatenate(arrays).astype(dtype) if arrays else np.empty(0, dtype)
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))

    columns = [
        pa.array([s.source_row for s in samples], pa.int64()),
        pa.array([int(s.loss_mask.sum()) for s in samples], pa.int32()),
        pa.array([s.digest() for s in samples], pa.uint64()),
        lists([s.input_ids for s in samples], "<i4").cast(SCHEMA.field("input_ids").type),
        lists([s.loss_mask for s in samples], "u1").cast(SCHEMA.field("loss_mask").type),
    ]
    meta = {
        "first_row": info.first_row,
        "stop_row": info.stop_row,
        "dropped": dict(sorted(info.dropped.items())),
        "bad_rows": {reason: asdict(rows) for reason, rows in sorted(info.bad_rows.items())},
        "noted": dict(sorted(info.noted.items())),
        "made_for": info.made_for,
    }
    schema = SCHEMA.with_metadata({_META: json.dumps(meta).encode()})
    write_batch(path, pa.record_batch(columns, schema=schema))


def read_part(path: Path) -> tuple[pa.RecordBatch, PartInfo]:
    """Map one part into memory and check its shape.

    Raises:
        CacheError: not an Arrow file, or not one of ours.
    """
    batch, metadata = read_batch(path, SCHEMA)
    try:
        meta = json.loads(metadata[_META])
        bad_rows = {reason: BadRows(**rows) for reason, rows in meta.get("bad_rows", {}).items()}
        dropped = Dropped(dict(meta["dropped"]), bad_rows, meta.get("noted", {}))
        info = PartInfo.of(meta["first_row"], meta["stop_row"], dropped, meta.get("made_for", ""))
        batch.validate(full=True)
    except (pa.ArrowException, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CacheError(path, f"cannot be read as prepared samples: {error}") from None
    return batch, info


class PreparedSamples:
    """All prepared samples of a cache, memory-mapped: memory does not grow with the tokens.

    ``samples[i]`` is the :class:`Sample` with ``sample_id`` i.
    """

    def __init__(self, folder: Path, num_parts: int):
        """Map parts 0 .. ``num_parts`` - 1 of ``folder``.

        Raises:
            CacheError: a part is missing, damaged or out of order.
        """
        self.folder = folder
        self._parts: list[pa.RecordBatch] = []
        self.dropped = Dropped()
        self.num_rows = 0
        for number in range(num_parts):
            batch, info = read_part(inside(folder, part_path(folder, number).name))
            if info.first_row != self.num_rows:
                raise CacheError(part_path(folder, number), f"begins at row {info.first_row}, not at {self.num_rows}")
            self.num_rows = info.stop_row
            self.dropped.add(Dropped(info.dropped, info.bad_rows, info.noted))
            self._parts.append(batch)
        self._starts = np.concatenate([[0], np.cumsum([b.num_rows for b in self._parts])]).astype(np.int64)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, sample_id: int) -> Sample:
        if not 0 <= sample_id < len(self):
            raise IndexError(f"sample_id {sample_id} is outside 0..{len(self) - 1}")
        part = int(np.searchsorted(self._starts, sample_id, side="right")) - 1
        batch, row = self._parts[part], sample_id - int(self._starts[part])
        sample = Sample(
            batch.column("input_ids")[row].values.to_numpy(),
            batch.column("loss_mask")[row].values.to_numpy(),
            batch.column("source_row")[row].as_py(),
        )
        if len(sample.input_ids) != len(sample.loss_mask) or sample.digest() != batch.column("digest")[row].as_py():
            raise CacheError(part_path(self.folder, part), f"sample {sample_id} does not match its digest")
        return sample

    def _column(self, name: str, dtype: type[np.generic]) -> np.ndarray:
        columns = [b.column(name) for b in self._parts]
        if name in ("input_ids", "loss_mask"):
            columns = [pc.list_value_length(c) for c in columns]
        return np.concatenate([np.empty(0, dtype), *(c.to_numpy().astype(dtype) for c in columns)])

    @cached_property
    def num_tokens(self) -> np.ndarray:
        """int64 ``[N]``: tokens of each sample."""
        return self._column("input_ids", np.int64)

    @cached_property
    def num_loss_tokens(self) -> np.ndarray:
        """int64 ``[N]``: learned tokens of each sample."""
        return self._column("num_loss_tokens", np.int64)

    @cached_property
    def source_rows(self) -> np.ndarray:
        """int64 ``[N]``: dataset row of each sample."""
        return self._column("source_row", np.int64)

    def learned(self, sample_ids: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of the first ``lengths`` tokens of each of ``sample_ids``, int64 ``[n]`` each: how many are learned, and 1 +
        the place of the last of them (0: none)."""
        counts, ends = np.zeros(len(sample_ids), np.int64), np.zeros(len(sample_ids), np.int64)
        part_of = np.searchsorted(self._starts, sample_ids, side="right") - 1
        for number in np.unique(part_of):
            wanted = np.flatnonzero(part_of == number)
            masks = self._parts[number].column("loss_mask")
            offsets = masks.offsets.to_numpy().astype(np.int64) - masks.offsets[0].as_py()
            mask = masks.flatten().to_numpy() != 0
            row = sample_ids[wanted] - self._starts[number]
            first = offsets[row]
            stop = np.minimum(first + lengths[wanted], offsets[row + 1])
            before = np.concatenate([[0], np.cumsum(mask)])
            last = np.maximum.accumulate(np.where(mask, np.arange(1, len(mask) + 1), 0))
            counts[wanted] = before[stop] - before[first]
            ends[wanted] = np.where(counts[wanted] > 0, last[np.maximum(stop, 1) - 1] - first, 0)
        return counts, ends

    def learned_counts(self, vocab_size: int) -> np.ndarray:
        """int64 ``[vocab_size]``: how often each token is learned.

        Raises:
            CacheError: a token is outside of the vocabulary.
        """
        counts = np.zeros(vocab_size, np.int64)
        for number, batch in enumerate(self._parts):
            ids, mask = (batch.column(name).flatten().to_numpy() for name in ("input_ids", "loss_mask"))
            learned = ids[mask != 0]
            if len(learned) and not 0 <= learned.min() <= learned.max() < vocab_size:
                problem = f"is damaged: it has tokens outside of 0..{vocab_size - 1}"
                raise CacheError(part_path(self.folder, number), problem)
            counts += np.bincount(learned, minlength=vocab_size)
        return counts

    def digest(self) -> str:
        """Order-sensitive digest of every sample: xxh3_128 (hex) over the samples' uint64 digests, little-endian."""
        return xxhash.xxh3_128(self._column("digest", np.uint64).astype("<u8").data).hexdigest()
