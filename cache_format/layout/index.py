"""index.arrow (one row a sample) and shards.arrow (one row a shard): Arrow IPC files, one record batch, uncompressed.

Both can be rebuilt from the shards alone. index.arrow is memory-mapped: opening it costs the same for any number of
samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pyarrow as pa

from cache_format.codecs.interface import ENERGY
from cache_format.codecs.token_snr import TOKEN_SNR
from cache_format.errors import CacheError
from cache_format.layout.arrow_file import numbers, read_batch, write_batch
from cache_format.layout.shard_layout import ShardSchema, shard_name
from cache_format.layout.shard_reader import ShardFile
from cache_format.storage.folder import Folder

INDEX_NAME = "index.arrow"
SHARDS_NAME = "shards.arrow"
_FINGERPRINT = b"dflash_cache.fingerprint"


def _schema(**columns: pa.DataType) -> pa.Schema:
    return pa.schema([pa.field(name, dtype, nullable=False) for name, dtype in columns.items()])


_NUMBERS = pa.list_(pa.field("item", pa.float64(), nullable=False))
INDEX_SCHEMA = _schema(
    sample_id=pa.int64(),
    shard=pa.int32(),
    row_start=pa.int64(),
    num_tokens=pa.int32(),
    num_loss_tokens=pa.int32(),
    checksum=pa.uint64(),
)
SHARDS_SCHEMA = _schema(
    file=pa.string(),
    samples=pa.int64(),
    tokens=pa.int64(),
    bytes=pa.int64(),
    checksum=pa.uint64(),
    states_bytes=pa.int64(),
    energy=_NUMBERS,
    error_energy=_NUMBERS,
)


@dataclass(frozen=True, slots=True)
class Index:
    """Where each stored sample lies; equal-length columns in ascending order of ``sample_id``."""

    sample_id: np.ndarray
    """int64: position among the prepared samples"""
    shard: np.ndarray
    """int32: shard number"""
    row_start: np.ndarray
    """int64: its first row in the shard's tensors"""
    num_tokens: np.ndarray
    """int32"""
    num_loss_tokens: np.ndarray
    """int32"""
    checksum: np.ndarray
    """uint64: see ``shard.sample_hasher``"""

    def __len__(self) -> int:
        return len(self.sample_id)


@dataclass(frozen=True, slots=True)
class ShardRow:
    """One row of shards.arrow."""

    file: str
    """path below the cache"""
    samples: int
    tokens: int
    bytes: int
    """size of the file"""
    checksum: int
    """see ``ShardFile.head_checksum``"""
    states_bytes: int
    """of these, what stands for hidden_states"""
    energy: list[float]
    """sum of squares of each layer's states before a lossy codec; empty with a lossless one"""
    error_energy: list[float]
    """the same of what the codec changed"""
    token_snr: np.ndarray | None = field(default=None, compare=False)
    """int32 ``[L, BINS]``, how many tokens have which SNR; not in the table: the shard itself says it"""


def shard_rows(shard: ShardFile) -> Part:
    """What the tables say of one shard; ``num_loss_tokens`` is counted from its loss_mask."""
    offset, size = shard.row_range("loss_mask", 0, shard.num_tokens)
    mask = np.empty(size, np.uint8)
    shard.read_into(offset, mask)
    starts = shard.cu_seqlens[:-1]
    loss = np.concatenate([[0], np.cumsum(mask, dtype=np.int64)])
    energies = shard.codec_head.get(ENERGY)
    row = ShardRow(
        file=shard_name(shard.number),
        samples=shard.num_samples,
        tokens=shard.num_tokens,
        bytes=shard.container.num_bytes,
        checksum=shard.head_checksum(),
        states_bytes=shard.states_bytes(),
        energy=[] if energies is None else energies[0].tolist(),
        error_energy=[] if energies is None else energies[1].tolist(),
        token_snr=shard.codec_head.get(TOKEN_SNR),
    )
    return row, Index(
        shard.sample_ids,
        np.full(shard.num_samples, shard.number, np.int32),
        starts,
        np.diff(shard.cu_seqlens).astype(np.int32),
        (loss[shard.cu_seqlens[1:]] - loss[starts]).astype(np.int32),
        shard.sample_checksums,
    )


Part = tuple[ShardRow, Index]
"""What the tables say of one shard."""


def tables_from_shards(
    folder: Folder, schema: ShardSchema, numbers: Iterable[int], known: Mapping[int, Part] = MappingProxyType({})
) -> tuple[list[ShardRow], Index]:
    """Rebuild both tables from shard files; reads heads and loss masks, not hidden_states, nor shards that are known.

    Raises:
        CacheError: a shard is missing or damaged.
    """

    def read(number: int) -> Part:
        if number in known:
            return known[number]
        with ShardFile(folder.open(shard_name(number)), schema, number) as shard:
            return shard_rows(shard)

    rows, indexes = [], []
    for row, index in map(read, numbers) if folder.readers is None else folder.readers.map(read, numbers):
        rows.append(row)
        indexes.append(index)
    columns = [
        np.concatenate([np.empty(0, field.type.to_pandas_dtype()), *(getattr(i, field.name) for i in indexes)])
        for field in INDEX_SCHEMA
    ]
    order = np.argsort(columns[0], kind="stable")
    return rows, Index(*(column[order] for column in columns))


def write_index(path: Path, index: Index, fingerprint: str) -> None:
    """Commit index.arrow.

    Raises:
        StorageError: the operating system refused.
    """
    columns = [pa.array(getattr(index, field.name), field.type) for field in INDEX_SCHEMA]
    _write(path, INDEX_SCHEMA, columns, fingerprint)


def write_shards(path: Path, rows: list[ShardRow], fingerprint: str) -> None:
    """Commit shards.arrow, one row a shard in the order of their numbers.

    Raises:
        StorageError: the operating system refused.
    """
    columns = [pa.array([getattr(row, field.name) for row in rows], field.type) for field in SHARDS_SCHEMA]
    _write(path, SHARDS_SCHEMA, columns, fingerprint)


def read_index(path: Path, fingerprint: str) -> Index:
    """Map index.arrow into memory.

    Raises:
        CacheError: missing, damaged, or of another cache.
    """
    batch = _read(path, INDEX_SCHEMA, fingerprint)
    return Index(*(numbers(batch.column(field.name)) for field in INDEX_SCHEMA))


def read_shards(path: Path, fingerprint: str) -> list[ShardRow]:
    """Read shards.arrow.

    Raises:
        CacheError: missing, damaged, or of another cache.
    """
    batch = _read_shards(path, fingerprint)
    columns = [batch.column(field.name).to_pylist() for field in SHARDS_SCHEMA]
    return [ShardRow(*values) for values in zip(*columns, strict=True)]


def read_shard_facts(path: Path, fingerprint: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of shards.arrow what a reader needs, ``[num_shards]`` each: samples, bytes of the file, checksum (uint64).

    Raises:
        CacheError: missing, damaged, or of another cache.
    """
    batch = _read_shards(path, fingerprint)
    return tuple(numbers(batch.column(name)) for name in ("samples", "bytes", "checksum"))  # type: ignore[return-value]


def _read_shards(path: Path, fingerprint: str) -> pa.RecordBatch:
    batch = _read(path, SHARDS_SCHEMA, fingerprint)
    try:
        # Not pa.array(), for the reason given at numbers().
        named = batch.column("file").to_pylist()
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise CacheError(path, f"is damaged: {error}") from None
    if named != [shard_name(number) for number in range(len(named))]:
        raise CacheError(path, f"does not name its shards {shard_name(0)} and so on")
    return batch


def _write(path: Path, schema: pa.Schema, columns: list[pa.Array], fingerprint: str) -> None:
    schema = schema.with_metadata({_FINGERPRINT: fingerprint.encode()})
    write_batch(path, pa.record_batch(columns, schema=schema))


def _read(path: Path, schema: pa.Schema, fingerprint: str) -> pa.RecordBatch:
    batch, metadata = read_batch(path, schema)
    if metadata.get(_FINGERPRINT) != fingerprint.encode():
        raise CacheError(path, "belongs to another cache: its fingerprint differs from the manifest's")
    return batch
