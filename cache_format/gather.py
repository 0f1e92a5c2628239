"""Many samples -> one padded or packed batch: positional reads straight to their places in one block of memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cache_format.batch import DFlashTargetBatch
from cache_format.safetensors_file import DTYPES
from cache_format.shard import ShardFile, ShardSchema

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


@dataclass(frozen=True, slots=True)
class _Place:
    start: int
    stop: int
    row_bytes: int


def batch_bytes(schema: ShardSchema, rows: int, length: int) -> int:
    """Memory of a batch of ``rows`` rows of ``length`` tokens."""
    return max(place.stop for place in _layout(schema, rows * length).values())


def gather(
    schema: ShardSchema,
    pieces: Sequence[Piece],
    rows: int,
    length: int,
    allocate: Callable[[int], Tensor],
    check: Check | None = None,
) -> DFlashTargetBatch:
    """Read ``pieces`` into a batch ``[rows, length]``; what no piece fills is zero, its masks too.

    Args:
        schema: of the shards.
        pieces: of each row from left to right, without gaps.
        allocate: gives uint8 memory, of a size in bytes, for all tensors of the batch together.
        check: looks at every sample as it was read.

    Raises:
        CacheError: a shard ended early; what ``check`` raises.
        StorageError: the operating system refused.
    """
    places = _layout(schema, rows * length)
    memory = allocate(max(place.stop for place in places.values()))
    arrays = {
        name: memory[place.start : place.stop].numpy().reshape(rows, length, place.row_bytes)
        for name, place in places.items()
    }
    filled = [0] * rows
    for piece in pieces:
        filled[piece.row] = piece.at + piece.length
        stored = _read(schema, piece, {name: a[piece.row, piece.at : filled[piece.row]] for name, a in arrays.items()})
        if check is not None:
            check(piece, stored)
    for row, stop in enumerate(filled):
        for array in arrays.values():
            array[row, stop:] = 0
    tensors = {
        tensor.name: memory[places[tensor.name].start : places[tensor.name].stop]
        .view(_batch_dtype(tensor.name, tensor.dtype))
        .view(rows, length, *tensor.shape(0)[1:])
        for tensor in schema.token_tensors
    }
    captures = {tensor.name: widened(tensors[tensor.name]) for tensor in schema.captures}
    return DFlashTargetBatch(schema.codec.decode(tensors), *(tensors[name] for name in INT64_FIELDS), **captures)


def widened(stored: Tensor) -> Tensor:
    """Token ids are int64 in a batch; everything else is as stored."""
    return stored.to(torch.int64) if stored.dtype == torch.int32 else stored


def _batch_dtype(name: str, dtype: str) -> torch.dtype:
    return torch.int64 if name in INT64_FIELDS else DTYPES[dtype]


def _layout(schema: ShardSchema, tokens: int) -> dict[str, _Place]:
    """Place of every tensor in the memory of a batch of ``tokens`` tokens, padding included."""
    places, start = {}, 0
    for tensor in schema.token_tensors:
        row_bytes = torch.int64.itemsize if tensor.name in INT64_FIELDS else tensor.row_bytes
        places[tensor.name] = _Place(start, start + tokens * row_bytes, row_bytes)
        start = -(-places[tensor.name].stop // _ALIGNMENT) * _ALIGNMENT
    return places


def _read(schema: ShardSchema, piece: Piece, targets: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Read one sample into ``targets`` (uint8 ``[length, row_bytes]``); returns its stored bytes in file order."""
    stored = []
    for tensor in schema.token_tensors:
        offset, size = piece.shard.row_range(tensor.name, piece.start, piece.start + piece.length)
        target = targets[tensor.name]
        if tensor.name in INT64_FIELDS:
            data = np.empty(size, np.uint8)
            piece.shard.read_into(offset, data)
            target.view(np.int64)[:, 0] = data.view(np.int32) if tensor.dtype == "I32" else data
        else:
            data = target.reshape(-1)
            piece.shard.read_into(offset, data)
        stored.append(data)
    return stored
