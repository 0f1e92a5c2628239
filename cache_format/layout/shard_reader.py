"""A shard on disk, opened and checked; its rows are read by offset."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xxhash

from cache_format.codecs.interface import BLOCK_STARTS, BLOCKS
from cache_format.errors import CacheError
from cache_format.layout.safetensors_file import Container, read_container
from cache_format.layout.shard_layout import ShardSchema, sample_hasher
from cache_format.storage.byte_source import ByteSource, LocalFile

READ_CHUNK_BYTES = 4 << 20
SKIPPED_BYTES = 256
"""Fewer are read along: a read costs as much as copying some KiB."""
_HEADER_BYTES = 8 << 10
"""A header is seldom longer; where it is, it is parsed."""
_SIZES = tuple(
    re.compile(rb'"%s":\{"dtype":"%s","shape":\[(\d{1,15})\]' % (name, dtype))
    for name, dtype in ((b"sample_ids", b"I64"), (b"input_ids", b"I32"), (BLOCKS.encode(), b"U8"))
)
_NUMPY = {"I32": "<i4", "I64": "<i8", "U64": "<u8", "F64": "<f8", "U8": "u1"}


class ShardFile:
    """A shard opened for reading, its header and head checked; rows are read by offset, never the whole file.

    Thread-safe: reads carry their own offsets. Close it, or use it as a context manager.
    """

    def __init__(self, source: Path | ByteSource, schema: ShardSchema, number: int):
        """Open and check shard ``number``: a file, or what else its bytes come from, which is then closed with it.

        Raises:
            CacheError: missing, damaged, or not this shard of this cache.
        """
        self.schema, self.number = schema, number
        self.source = LocalFile(source) if isinstance(source, Path) else source
        self.where = self.source.where
        try:
            self.container = self._laid_down() or self._checked_header()
            self._keep()
            self.cu_seqlens = self._array("cu_seqlens")
            self.sample_ids = self._array("sample_ids")
            self.sample_checksums = self._array("sample_checksums")
            self.codec_head = {t.name: self._array(t.name) for t in schema.codec_head(len(self.sample_ids))}
            self._check_head()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> ShardFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the file back. Closing twice is harmless."""
        self.source.close()

    @property
    def num_samples(self) -> int:
        """Samples in the shard."""
        return len(self.sample_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens in the shard."""
        return int(self.cu_seqlens[-1])

    def states_bytes(self) -> int:
        """Bytes that stand for hidden_states: the codec's tensors with a row a token, or the blocks."""
        names = [tensor.name for tensor in self.schema.codec.tensors(self.schema.states)]
        return sum(self.container.places[name].num_bytes for name in (names or [BLOCKS]))

    def head_checksum(self) -> int:
        """The shard's checksum: xxh3_64 over the file from its first byte to the end of the head.

        It covers the header, lengths, ids and sample checksums; those cover every other byte of the file.
        """
        stop = self.container.places[self.schema.head(self.num_samples)[-1].name].stop
        data = np.empty(stop, np.uint8)
        self.read_into(0, data)
        return xxhash.xxh3_64(data.data).intdigest()

    def position_at(self, row: int) -> int:
        """Position in the shard of the sample whose first row is ``row``.

        Raises:
            CacheError: no sample begins there.
        """
        position = int(np.searchsorted(self.cu_seqlens, row))
        if position >= self.num_samples or self.cu_seqlens[position] != row:
            raise CacheError(self.where, f"no sample begins at row {row:,}")
        return position

    def block_range(self, position: int) -> tuple[int, int]:
        """File offset and size in bytes of the blocks of the sample at ``position``."""
        start, stop = self.codec_head[BLOCK_STARTS][position : position + 2].tolist()
        return self.container.places[BLOCKS].start + start, stop - start

    def sample_ranges(self, position: int) -> list[tuple[int, int]]:
        """File offset and size of all that is stored of the sample at ``position``, in the checksum's order."""
        start, stop = int(self.cu_seqlens[position]), int(self.cu_seqlens[position + 1])
        ranges = [self.row_range(tensor.name, start, stop) for tensor in self.schema.token_tensors]
        return [*ranges, self.block_range(position)] if self.schema.has_blocks else ranges

    def row_range(self, name: str, start: int, stop: int) -> tuple[int, int]:
        """File offset and size in bytes of rows ``start`` to ``stop`` of a per-token tensor."""
        place = self.container.places[name]
        return place.start + start * place.row_bytes, (stop - start) * place.row_bytes

    @property
    def is_local(self) -> bool:
        """Whether it is a file on this machine, where a small read costs little."""
        return isinstance(self.source, LocalFile)

    def rows_there(self, name: str, start: int, stop: int) -> np.ndarray | None:
        """Rows of a per-token tensor, uint8 ``[rows, bytes]``, where they can be had without a copy; else None."""
        if not isinstance(self.source, LocalFile):
            return None
        found = self.source.there(*self.row_range(name, start, stop))
        return None if found is None else found.reshape(stop - start, -1)

    def read_rows(self, name: str, start: int, out: np.ndarray, columns: Sequence[slice] | None = None) -> None:
        """Read rows of a per-token tensor from row ``start`` on into ``out`` (uint8 ``[rows, bytes]``, contiguous).

        Args:
            name: of the tensor.
            start: the first row.
            out: as many rows as are wanted.
            columns: which bytes of each row, one after the other; None: all. What lies between them is skipped where
                the file is on this machine and that is ``SKIPPED_BYTES`` or more a row.

        Raises:
            CacheError, StorageError: as :meth:`read_into`.
        """
        place = self.container.places[name]
        offset = place.start + start * place.row_bytes
        if columns is None:
            self.read_into(offset, out.reshape(-1))
            return
        skipping = self.source if place.row_bytes - out.shape[1] >= SKIPPED_BYTES else None
        if not isinstance(skipping, LocalFile):
            whole = np.empty((len(out), place.row_bytes), np.uint8)
            self.read_into(offset, whole.reshape(-1))
        at = 0
        for run in columns:
            part = out[:, at : at + run.stop - run.start]
            if isinstance(skipping, LocalFile):
                skipping.read_strided_into(offset + run.start, place.row_bytes, part)
            else:
                part[:] = whole[:, run]
            at += part.shape[1]

    def read_into(self, offset: int, out: np.ndarray) -> None:
        """Fill ``out`` (uint8, contiguous) with the file's bytes from ``offset``.

        Raises:
            CacheError: the file ended early.
            StorageError: the operating system, or the store, refused.
        """
        self.source.read_into(offset, out)

    def computed_checksum(self, position: int) -> int:
        """The checksum of the sample at ``position`` as its bytes are now; reads in chunks of 4 MiB."""
        hasher = sample_hasher(int(self.sample_ids[position]))
        for offset, size in self.sample_ranges(position):
            for at in range(0, size, READ_CHUNK_BYTES):
                chunk = np.empty(min(READ_CHUNK_BYTES, size - at), np.uint8)
                self.read_into(offset + at, chunk)
                hasher.update(chunk.data)
        return hasher.intdigest()

    def _array(self, name: str) -> np.ndarray:
        place = self.container.places[name]
        out = np.empty(place.num_bytes, np.uint8)
        self.read_into(place.start, out)
        return out.view(_NUMPY[place.dtype]).reshape(place.shape)

    def _keep(self) -> None:
        """The head, and the few bytes a token that lie behind the states: each is one read where reads are slow."""
        places = self.container.places
        self.source.keep(0, places[self.schema.head(0)[-1].name].stop)
        narrow = sorted((places[name] for name in ("input_ids", "attention_mask", "loss_mask")), key=lambda p: p.start)
        start, stop = narrow[0].start, narrow[0].stop
        for place in narrow[1:]:
            if place.start != stop:
                self.source.keep(start, stop)
                start = place.start
            stop = place.stop
        self.source.keep(start, stop)

    def _laid_down(self) -> Container | None:
        """The header as the format lays it down for the sizes that it names, if that is what the file begins with.

        Nothing is parsed, so nothing has to be checked; None says nothing yet.
        """
        head = np.empty(min(self.source.size, _HEADER_BYTES), np.uint8)
        self.source.read_into(0, head)
        begin = head.tobytes()
        found = [pattern.search(begin) for pattern in _SIZES[: 2 + self.schema.has_blocks]]
        if not all(found):
            return None
        expected = self.schema.layout(self.number, *(int(match[1]) for match in found if match))
        whole = begin.startswith(expected.header) and self.source.size == expected.num_bytes
        return expected if whole else None

    def _checked_header(self) -> Container:
        """The header of a file that may hold anything.

        Raises:
            CacheError: it is not the one of this shard, and how it differs.
        """
        container = read_container(self.source)
        found, places = container.metadata, container.places
        for key, value in self.schema.metadata(self.number).items():
            if found.get(key) != value:
                raise CacheError(
                    self.where, f"{key} is {found.get(key)!r}, this cache's shard has {value!r} (swapped file?)"
                )
        ids, rows = places.get("sample_ids"), places.get("input_ids")
        if ids is None or rows is None or not ids.shape or not rows.shape:
            raise CacheError(self.where, "has no sample_ids or no input_ids")
        blocks = places.get(BLOCKS)
        block_bytes = blocks.num_bytes if blocks is not None else 0
        expected = self.schema.layout(self.number, ids.shape[0], rows.shape[0], block_bytes)
        if container.header != expected.header:
            raise CacheError(self.where, "header is not the one that the format lays down for its samples and tokens")
        return container

    def _check_head(self) -> None:
        rows = self.container.places["input_ids"].shape[0]
        cu = self.cu_seqlens
        if cu[0] != 0 or cu[-1] != rows or (np.diff(cu) < 1).any() or (cu < 0).any():
            raise CacheError(self.where, f"cu_seqlens does not divide its {rows:,} tokens into samples")
        if self.schema.has_blocks:
            starts, size = self.codec_head[BLOCK_STARTS], self.container.places[BLOCKS].num_bytes
            if starts[0] != 0 or starts[-1] != size or (np.diff(starts) < 1).any() or (starts < 0).any():
                raise CacheError(self.where, f"{BLOCK_STARTS} does not divide its {size:,} bytes into samples")
