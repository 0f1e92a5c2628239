"""One shard: flat, unpadded tensors over its samples in one safetensors file. Layout, filling, reading.

The head comes first (cu_seqlens, sample_ids, sample_checksums and the codec's own: multiples of 8 bytes), then the
tensors with one row a token, those whose rows keep the widest alignment first: the codec's tensors (hidden_states on a
page), input_ids, the masks; last, where the codec makes them, the encoded blocks of the samples. But for the length
of these, a header follows from the plan, so it can be compared byte for byte.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import xxhash
from torch import Tensor

from cache_format.byte_source import ByteSource, LocalFile
from cache_format.codecs import BlockCodec, Codec, HeadTensor, RawCodec, States, TokenTensor
from cache_format.codecs.interface import BLOCK_STARTS, BLOCKS
from cache_format.direct_write import write_direct
from cache_format.errors import CacheError
from cache_format.host_memory import host_memory
from cache_format.safetensors_file import DTYPES, PAGE, Container, TensorPlace, plan_container, read_container
from cache_format.storage import committed, write_all

FORMAT_NAME = "dflash-cache"
FORMAT_VERSION = 1
HEAD = (("cu_seqlens", "I64"), ("sample_ids", "I64"), ("sample_checksums", "U64"))
READ_CHUNK_BYTES = 4 << 20
_HEADER_BYTES = 8 << 10
"""A header is seldom longer; where it is, it is parsed."""
_SIZES = tuple(
    re.compile(rb'"%s":\{"dtype":"%s","shape":\[(\d{1,15})\]' % (name, dtype))
    for name, dtype in ((b"sample_ids", b"I64"), (b"input_ids", b"I32"), (BLOCKS.encode(), b"U8"))
)
_NUMPY = {"I64": "<i8", "U64": "<u8", "F64": "<f8", "U8": "u1"}


def shard_name(number: int) -> str:
    """File of shard ``number`` below the cache, with ``/`` between folder and name."""
    return f"shards/shard-{number:05d}.safetensors"


def finished_shards(names: Iterable[str]) -> list[int]:
    """Numbers of the shards among ``names``, the files in shards/, in order."""
    numbers = (re.fullmatch(r"shard-(\d{5,12})\.safetensors", name) for name in names)
    return sorted(int(match[1]) for match in numbers if match)


@dataclass(frozen=True, kw_only=True)
class ShardSchema:
    """What every shard of one cache has in common."""

    fingerprint: str
    """the cache's fingerprint; a shard of another cache is told by it"""
    codec: Codec
    states: States
    """hidden_states before the codec"""
    captures: tuple[TokenTensor, ...] = ()
    """tensors of what else is captured, see captures.py"""

    @cached_property
    def token_tensors(self) -> tuple[TokenTensor, ...]:
        """The tensors with a row for each token, in file order."""
        tensors = [
            *self.codec.tensors(self.states),
            *self.captures,
            TokenTensor("input_ids", "I32"),
            TokenTensor("attention_mask", "U8"),
            TokenTensor("loss_mask", "U8"),
        ]
        return tuple(sorted(tensors, key=lambda tensor: -math.gcd(tensor.row_bytes, 8)))

    @property
    def has_blocks(self) -> bool:
        """Whether a sample has, beside its rows, a run of bytes in ``BLOCKS``."""
        return isinstance(self.codec, BlockCodec)

    @property
    def raw(self) -> ShardSchema:
        """The same before the codec."""
        return replace(self, codec=RawCodec())

    @property
    def token_bytes(self) -> int:
        """Bytes stored for each token; without its share of the blocks."""
        return sum(tensor.row_bytes for tensor in self.token_tensors)

    def head(self, num_samples: int) -> list[HeadTensor]:
        """The tensors before those with a row a token."""
        sizes = {"cu_seqlens": num_samples + 1, "sample_ids": num_samples, "sample_checksums": num_samples}
        head = [HeadTensor(name, dtype, (sizes[name],)) for name, dtype in HEAD]
        return [*head, *self.codec.head(self.states, num_samples)]

    def metadata(self, number: int) -> dict[str, str]:
        """``__metadata__`` of shard ``number``."""
        return {
            "format": FORMAT_NAME,
            "format_version": str(FORMAT_VERSION),
            "fingerprint": self.fingerprint,
            "shard": str(number),
        }

    def layout(self, number: int, num_samples: int, num_tokens: int, block_bytes: int = 0) -> Container:
        """Header and places of shard ``number``; a pure function."""
        tensors = [(tensor.name, tensor.dtype, tensor.shape) for tensor in self.head(num_samples)]
        tensors += [(tensor.name, tensor.dtype, tensor.shape(num_tokens)) for tensor in self.token_tensors]
        if self.has_blocks:
            return plan_container([*tensors, (BLOCKS, "U8", (block_bytes,))], self.metadata(number))
        return plan_container(tensors, self.metadata(number), page_aligned="hidden_states")

    def num_bytes(self, number: int, num_samples: int, num_tokens: int) -> int:
        """Size of shard ``number`` as a file; where it depends on the states, the size that is to be expected."""
        expected = round(num_tokens * self.states.row_bytes * self.codec.expected_ratio) if self.has_blocks else 0
        return self.layout(number, num_samples, num_tokens, expected).num_bytes


class ShardBuffer:
    """Host memory that holds one shard while it is filled in place; used again for shard after shard."""

    def __init__(self, capacity: int, pin_memory: bool = False):
        """``capacity`` bytes: the largest shard of the plan. ``pin_memory`` makes copies from CUDA asynchronous."""
        self.capacity = capacity
        memory = host_memory(capacity + 2 * PAGE, pin_memory)
        # In memory a byte lies on a page as it does in the file: see direct_write.py.
        self._memory = memory[-memory.data_ptr() % PAGE :]
        self.container: Container | None = None

    def begin(
        self, schema: ShardSchema, number: int, sample_ids: np.ndarray, num_tokens: np.ndarray, block_bytes: int = 0
    ) -> None:
        """Lay out shard ``number`` for samples of ``num_tokens`` tokens each, and fill in all but their rows.

        ``block_bytes``: room for the samples' blocks, see :meth:`end_blocks`.
        """
        self.schema, self.number = schema, number
        self.cu_seqlens = np.concatenate([[0], np.cumsum(num_tokens)]).astype(np.int64)
        self.container = schema.layout(number, len(num_tokens), int(self.cu_seqlens[-1]), block_bytes)
        # The header is kept apart: its length may change with that of the blocks.
        self._start = len(self.container.header) % PAGE
        self.tensor("cu_seqlens").numpy()[:] = self.cu_seqlens
        self.tensor("sample_ids").numpy()[:] = sample_ids
        self.tensor("attention_mask").fill_(1)

    def end_blocks(self, block_bytes: int) -> None:
        """Say how much of the room for blocks is used."""
        self.container = self.schema.layout(
            self.number, len(self.cu_seqlens) - 1, int(self.cu_seqlens[-1]), block_bytes
        )

    def tensor(self, name: str) -> Tensor:
        """The named tensor of the shard being filled, in place."""
        assert self.container is not None
        place = self.container.places[name]
        return self._slice(place.start, place.stop).view(DTYPES[place.dtype]).view(place.shape)

    def without(self, dropped: np.ndarray) -> ShardBuffer:
        """A copy that leaves out the samples where bool ``dropped [n]`` is True; not for shards with blocks."""
        assert self.container is not None
        lengths, kept = np.diff(self.cu_seqlens), ~dropped
        copy = ShardBuffer(self.container.num_bytes + PAGE)
        copy.begin(self.schema, self.number, self.tensor("sample_ids").numpy()[kept], lengths[kept])
        rows = torch.from_numpy(np.repeat(kept, lengths))
        for tensor in self.schema.codec.head(self.schema.states, int(kept.sum())):
            copy.tensor(tensor.name).copy_(self.tensor(tensor.name))
        for row in self.schema.token_tensors:
            copy.tensor(row.name).copy_(self.tensor(row.name)[rows])
        return copy

    def commit(self, path: Path, *, read_next: bool = False) -> int:
        """Checksum every sample, write the file and commit it; returns its size in bytes.

        ``read_next``: the file is read at once, to be uploaded, so it goes through the page cache.

        Raises:
            StorageError: the operating system refused; nothing is left under the final name.
        """
        assert self.container is not None
        ids = self.tensor("sample_ids").numpy()
        views = [self._rows(self.container.places[t.name]) for t in self.schema.token_tensors]
        bounds = [self.cu_seqlens] * len(views)
        if self.schema.has_blocks:
            views.append(self.tensor(BLOCKS).numpy())
            bounds.append(self.tensor(BLOCK_STARTS).numpy())
        checksums = self.tensor("sample_checksums").numpy()
        for i in range(len(ids)):
            hasher = sample_hasher(int(ids[i]))
            for rows, bound in zip(views, bounds, strict=True):
                hasher.update(rows[bound[i] : bound[i + 1]].data)
            checksums[i] = hasher.intdigest()
        header = self.container.header
        with committed(path) as file:
            write_all(file, header)
            data = self._bytes(len(header), self.container.num_bytes)
            if read_next:
                write_all(file, data.data)
            else:
                write_direct(file, data)
        return self.container.num_bytes

    def _slice(self, start: int, stop: int) -> Tensor:
        """The memory of file offsets ``start`` to ``stop``."""
        assert self.container is not None
        shift = self._start - len(self.container.header)
        return self._memory[start + shift : stop + shift]

    def _bytes(self, start: int, stop: int) -> np.ndarray:
        return self._slice(start, stop).numpy()

    def _rows(self, place: TensorPlace) -> np.ndarray:
        return self._bytes(place.start, place.stop).reshape(place.shape[0], place.row_bytes)


def sample_hasher(sample_id: int) -> xxhash.xxh3_64:
    """Start of a sample's checksum: xxh3_64 over sample_id (int64), then its stored rows, tensor by tensor."""
    return xxhash.xxh3_64(np.int64(sample_id).astype("<i8").tobytes())


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
            self.codec_head = {
                t.name: self._array(t.name) for t in schema.codec.head(schema.states, len(self.sample_ids))
            }
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
