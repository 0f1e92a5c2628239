"""Many samples -> one padded or packed batch: positional reads straight to their places in one block of memory.

States that a codec encoded are read into memory that each thread uses again and decoded to their places; or, where the
batch goes to a device, those of a :class:`RowCodec` stay as they are and are decoded there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cache_format.batch import DFlashTargetBatch
from cache_format.codecs import BlockCodec, RawCodec, RowCodec, TokenTensor
from cache_format.codecs.dtypes import DTYPE_NAMES, DTYPES
from cache_format.codecs.interface import BLOCKS
from cache_format.errors import CacheError
from cache_format.layout.index import Index
from cache_format.layout.manifest import Manifest
from cache_format.layout.shard_layout import ShardSchema
from cache_format.layout.shard_reader import ShardFile
from cache_format.reading.read_ahead import Turn

_ALIGNMENT = 64
INT64_FIELDS = ("input_ids", "attention_mask", "loss_mask")
"""Stored narrow, int64 in a batch."""

Check = Callable[["Piece", Sequence[np.ndarray]], None]
"""Called with a sample's stored bytes, tensor by tensor in file order."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Where a sample comes from and where it goes."""

    sample: int
    """index in the cache"""
    shard: ShardFile
    start: int
    """its first row in the shard's tensors"""
    length: int
    """tokens taken"""
    row: int
    """of the batch"""
    at: int
    """first token in that row"""


@dataclass(frozen=True)
class Gathered:
    """A batch as it was read."""

    schema: ShardSchema
    batch: DFlashTargetBatch
    """its hidden_states are still encoded where ``encoded`` is not empty"""
    encoded: dict[str, Tensor] = field(default_factory=dict)
    """the codec's tensors ``[B, S, ...]``"""

    def to(self, device: torch.device | str) -> Gathered:
        """Copy it, without waiting."""
        encoded = {name: tensor.to(device, non_blocking=True) for name, tensor in self.encoded.items()}
        return replace(self, batch=self.batch.to(device, non_blocking=True), encoded=encoded)

    def decoded(self) -> DFlashTargetBatch:
        """The batch, its hidden_states decoded where they are."""
        codec = self.schema.codec
        if not self.encoded or not isinstance(codec, RowCodec):
            return self.batch
        return replace(self.batch, hidden_states=codec.decode(self.encoded, self.schema.states))


class BatchSource(Protocol):
    """What a loader takes batches from: a cache."""

    manifest: Manifest
    index: Index

    def __len__(self) -> int:
        """Stored samples."""

    def gather(
        self,
        rows: Sequence[Sequence[int] | np.ndarray],
        *,
        allocate: Callable[[int], Tensor],
        max_length: int | None = None,
        pack_to: int | None = None,
        decode: bool = True,
    ) -> Gathered:
        """See ``FeatureCache.gather``."""

    def fetching_ahead(self, turns: Iterator[Turn], window_shards: int) -> Iterator[Turn]:
        """See ``FeatureCache.fetching_ahead``."""


@dataclass(frozen=True, slots=True)
class _Place:
    start: int
    stop: int
    row_bytes: int


def batch_bytes(schema: ShardSchema, rows: int, length: int, decode: bool = True) -> int:
    """Memory of a batch of ``rows`` rows of ``length`` tokens; ``decode`` as for :func:`gather`."""
    return max(place.stop for place in _layout(_batch_tensors(schema, decode), rows * length).values())


def gather(
    schema: ShardSchema,
    pieces: Sequence[Piece],
    rows: int,
    length: int,
    allocate: Callable[[int], Tensor],
    check: Check | None = None,
    decode: bool = True,
    readers: Executor | None = None,
) -> Gathered:
    """Read ``pieces`` into a batch ``[rows, length]``; what no piece fills is zero, its masks too.

    Args:
        schema: of the shards.
        pieces: of each row from left to right, without gaps.
        allocate: gives uint8 memory, of a size in bytes, for all tensors of the batch together.
        check: looks at every sample as it was read.
        decode: False: leave states encoded, where each token is on its own (a :class:`RowCodec`).
        readers: threads that read the pieces side by side; None: one after the other.

    Raises:
        CacheError: a shard ended early; a sample cannot be decoded; what ``check`` raises.
        StorageError: the operating system refused.
    """
    decode = decode or isinstance(schema.codec, BlockCodec)
    in_batch = _batch_tensors(schema, decode)
    places = _layout(in_batch, rows * length)
    memory = allocate(max(place.stop for place in places.values()))
    arrays = {
        name: memory[place.start : place.stop].numpy().reshape(rows, length, place.row_bytes)
        for name, place in places.items()
    }
    stored_as_it_is = {tensor.name for tensor in in_batch} - (_decoded_names(schema) if decode else set())

    def fill(piece: Piece) -> None:
        targets = {name: array[piece.row, piece.at : piece.at + piece.length] for name, array in arrays.items()}
        stored = _read(schema, piece, {name: targets[name] for name in stored_as_it_is})
        if check is not None:
            check(piece, list(stored.values()))
        if "hidden_states" not in stored_as_it_is:
            _decode(schema, piece, stored, targets["hidden_states"])

    filled = [0] * rows
    for piece in pieces:
        filled[piece.row] = piece.at + piece.length
    for _ in map(fill, pieces) if readers is None else readers.map(fill, pieces):
        pass
    for row, stop in enumerate(filled):
        for array in arrays.values():
            array[row, stop:] = 0
    tensors = {
        tensor.name: memory[places[tensor.name].start : places[tensor.name].stop]
        .view(_batch_dtype(tensor.name, tensor.dtype))
        .view(rows, length, *tensor.shape(0)[1:])
        for tensor in in_batch
    }
    captures = {tensor.name: widened(tensors[tensor.name]) for tensor in schema.captures}
    batch = DFlashTargetBatch(tensors["hidden_states"], *(tensors[name] for name in INT64_FIELDS), **captures)
    encoded = {} if decode or not _decoded_names(schema) else {t.name: tensors[t.name] for t in _codec_tensors(schema)}
    return Gathered(schema, batch, encoded)


def widened(stored: Tensor) -> Tensor:
    """Token ids are int64 in a batch; everything else is as stored."""
    return stored.to(torch.int64) if stored.dtype == torch.int32 else stored


def _batch_dtype(name: str, dtype: str) -> torch.dtype:
    return torch.int64 if name in INT64_FIELDS else DTYPES[dtype]


def _codec_tensors(schema: ShardSchema) -> tuple[TokenTensor, ...]:
    return schema.codec.tensors(schema.states)


def _decoded_names(schema: ShardSchema) -> set[str]:
    """The tensors that are not in a decoded batch, or not as they are stored."""
    return set() if isinstance(schema.codec, RawCodec) else {"hidden_states", *(t.name for t in _codec_tensors(schema))}


def _batch_tensors(schema: ShardSchema, decode: bool) -> list[TokenTensor]:
    """The tensors that a batch has in memory."""
    if isinstance(schema.codec, RawCodec) or not (decode or isinstance(schema.codec, BlockCodec)):
        return list(schema.token_tensors)
    states = TokenTensor("hidden_states", DTYPE_NAMES[schema.states.dtype], schema.states.width)
    decoded = _decoded_names(schema)
    return [states, *(tensor for tensor in schema.token_tensors if tensor.name not in decoded)]


def _layout(in_batch: Sequence[TokenTensor], tokens: int) -> dict[str, _Place]:
    """Place of every tensor in the memory of a batch of ``tokens`` tokens, padding included."""
    places, start = {}, 0
    for tensor in in_batch:
        row_bytes = torch.int64.itemsize if tensor.name in INT64_FIELDS else tensor.row_bytes
        places[tensor.name] = _Place(start, start + tokens * row_bytes, row_bytes)
        start = -(-places[tensor.name].stop // _ALIGNMENT) * _ALIGNMENT
    return places


def _read(schema: ShardSchema, piece: Piece, targets: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Read one sample; its stored bytes in file order, ``targets`` (uint8 ``[length, row_bytes]``) in their place."""
    ranges = {
        tensor.name: piece.shard.row_range(tensor.name, piece.start, piece.start + piece.length)
        for tensor in schema.token_tensors
    }
    if schema.has_blocks:
        ranges[BLOCKS] = piece.shard.block_range(piece.shard.position_at(piece.start))
    aside = _scratch(sum(size + _ALIGNMENT for _, size in ranges.values()))
    stored, at = {}, 0
    for name, (offset, size) in ranges.items():
        if name in targets and name not in INT64_FIELDS:
            stored[name] = targets[name].reshape(-1)
        else:
            stored[name] = aside[at : at + size]
            at += -(-size // _ALIGNMENT) * _ALIGNMENT
        piece.shard.read_into(offset, stored[name])
        if name in INT64_FIELDS:
            targets[name].view(np.int64)[:, 0] = stored[name].view(np.int32) if name == "input_ids" else stored[name]
    return stored


def _decode(schema: ShardSchema, piece: Piece, stored: dict[str, np.ndarray], out: np.ndarray) -> None:
    """Decode a sample's states into ``out`` (uint8 ``[length, row_bytes]``)."""
    codec, states, shard = schema.codec, schema.states, piece.shard
    if isinstance(codec, RowCodec):
        tensors = {
            tensor.name: torch.from_numpy(stored[tensor.name]).view(DTYPES[tensor.dtype]).view(tensor.shape(len(out)))
            for tensor in codec.tensors(states)
        }
        codec.decode_into(tensors, torch.from_numpy(out).view(states.dtype), states)
    if isinstance(codec, BlockCodec):
        position = shard.position_at(piece.start)
        num_tokens = int(shard.cu_seqlens[position + 1]) - piece.start
        try:
            bits = out.view(f"<u{states.dtype.itemsize}")
            codec.decode_sample(stored[BLOCKS], shard.codec_head, num_tokens, bits)
        except ValueError as error:
            sample = int(shard.sample_ids[position])
            raise CacheError(shard.where, f"sample {sample} cannot be decoded: {error}") from None


_thread = threading.local()


def _scratch(size: int) -> np.ndarray:
    """uint8 ``[size]``, not cleared: memory that this thread uses again."""
    memory: np.ndarray | None = getattr(_thread, "memory", None)
    if memory is None or len(memory) < size:
        memory = _thread.memory = np.empty(size, np.uint8)
    return memory[:size]
