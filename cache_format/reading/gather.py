"""Many samples -> one padded or packed batch: positional reads straight to their places in one block of memory.

States that a codec encoded are read piece by piece into memory that each thread uses again and decoded to their places;
raw ones that a view casts are cast on the way from the page cache, where the system lets them (bfloat16 to float32: 1.0
times the processor time of a batch that is not cast; 1.45 times with a read between). Or, where the batch goes to a
device, those of a :class:`RowCodec` stay as they are, those of a :class:`LayeredBlockCodec` are unpacked, and both are
decoded and cast there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from cache_format.batch import DFlashTargetBatch
from cache_format.codecs import BlockCodec, LayeredBlockCodec, RawCodec, RowCodec, TokenTensor
from cache_format.codecs.dtypes import DTYPE_NAMES, DTYPES
from cache_format.codecs.interface import BLOCKS, FEATURES, FILLED, PLACES, AsTheyAre
from cache_format.device import sent
from cache_format.errors import CacheError
from cache_format.layout.shard_layout import ShardSchema
from cache_format.layout.shard_reader import ShardFile
from cache_format.reading.view import CAST, STORED, View

_ALIGNMENT = 64
INT64_FIELDS = ("input_ids", "attention_mask", "loss_mask")
"""Stored narrow, int64 in a batch."""

_ELEMENTS = 1 << 17
"""Cast at a time: they stay in a core's cache from one step to the next."""

_READ_ELEMENTS = 1 << 20
"""Encoded states that are read at a time. Measured for fp8, GB/s with 1, 2 and 4 threads on 2 cores: 4.4, 5.1 and 3.5
with 2**17, 5.5, 7.5 and 6.5 with 2**19, 6.1, 6.9 and 9.0 with this, 7.9, 9.1 and 5.9 with 2**22: who comes back from a
read waits for Python's lock."""

Check = Callable[["Piece", "Sequence[np.ndarray] | None"], None]
"""Called with a sample's stored bytes, tensor by tensor in file order; None where not all of them were read."""


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
    check: Check | None = None
    """looks at the sample as it was read"""


@dataclass(frozen=True)
class Gathered:
    """A batch as it was read."""

    schema: ShardSchema
    batch: DFlashTargetBatch
    """its hidden_states are still encoded where ``encoded`` is not empty"""
    encoded: dict[str, Tensor] = field(default_factory=dict)
    """the codec's tensors ``[B, S, ...]``, in the batch's memory"""
    beside: dict[str, Tensor] = field(default_factory=dict)
    """of a :class:`LayeredBlockCodec`: what is of no fixed size, in memory that is not page-locked"""
    view: View = STORED
    """what is still to be done to the states"""

    def to(self, device: torch.device | str) -> Gathered:
        """Copy it, without waiting; what stands in the batch for encoded states is copied once."""
        encoded = {name: tensor.to(device, non_blocking=True) for name, tensor in self.encoded.items()}
        beside = {name: sent(tensor, torch.device(device)) for name, tensor in self.beside.items()}
        states = encoded.get("hidden_states", self.batch.hidden_states)
        batch = replace(self.batch, hidden_states=states).to(device, non_blocking=True)
        return replace(self, batch=batch, encoded=encoded, beside=beside)

    def decoded(self) -> DFlashTargetBatch:
        """The batch, its hidden_states decoded, and cast, where they are."""
        batch, codec = self.batch, self.schema.codec
        if self.encoded:
            read = self.view.read(self.schema)
            if isinstance(codec, LayeredBlockCodec):
                states = codec.decode(self.encoded | self.beside, read, self.view.layers)
            else:
                assert isinstance(codec, RowCodec)
                states = codec.decode(self.encoded, read)
            batch = replace(batch, hidden_states=states)
        if self.view == STORED:
            return batch
        fields = {name: getattr(batch, name) for name in CAST if getattr(batch, name) is not None}
        fields["hidden_states"] = self.view.selected(batch.hidden_states, self.schema)
        dtype = self.view.given(self.schema).dtype
        return replace(batch, **{name: tensor.to(dtype) for name, tensor in fields.items()})


@dataclass(frozen=True, slots=True)
class _Place:
    start: int
    stop: int
    row_bytes: int


def batch_bytes(schema: ShardSchema, tokens: int, decode: bool = True, view: View = STORED) -> int:
    """Memory of a batch of ``tokens`` tokens, padding included; ``decode`` and ``view`` as for :func:`gather`."""
    decode = decode or not schema.codec.crossing(schema.states)
    return max(place.stop for place in _layout(_batch_tensors(schema, view, decode), tokens).values())


def gather(
    schema: ShardSchema,
    pieces: Sequence[Piece],
    rows: int,
    length: int,
    allocate: Callable[[int], Tensor],
    decode: bool = True,
    readers: Executor | None = None,
    view: View = STORED,
) -> Gathered:
    """Read ``pieces`` into a batch ``[rows, length]``; what no piece fills is zero, its masks too.

    Args:
        schema: of the shards; where theirs differ, it is in the codec, and ``decode`` is True.
        pieces: of each row from left to right, without gaps.
        allocate: gives uint8 memory, of a size in bytes, for all tensors of the batch together.
        decode: False: leave states for a device to decode and cast, where the codec can be decoded there.
        readers: threads that read the pieces side by side; None: one after the other.
        view: which layers, and in which dtype.

    Raises:
        CacheError: a shard ended early; a sample cannot be decoded; what a piece's ``check`` raises.
        StorageError: the operating system refused.
    """
    decode = decode or not schema.codec.crossing(schema.states)
    in_batch = _batch_tensors(schema, view, decode)
    places = _layout(in_batch, rows * length)
    memory = allocate(max(place.stop for place in places.values()))
    arrays = {
        name: memory[place.start : place.stop].numpy().reshape(rows, length, place.row_bytes)
        for name, place in places.items()
    }

    features: list[tuple[np.ndarray, np.ndarray]] = []

    def fill(piece: Piece) -> None:
        targets = {name: array[piece.row, piece.at : piece.at + piece.length] for name, array in arrays.items()}
        as_they_are = _fill(piece, targets, view, decode)
        if as_they_are is not None:
            first = (piece.row * length + piece.at) * view.read(schema).width
            features.append((first + as_they_are[0], as_they_are[1]))

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
        .view(_batch_dtype(tensor))
        .view(rows, length, *tensor.shape(0)[1:])
        for tensor in in_batch
    }
    captures = {tensor.name: widened(tensors[tensor.name]) for tensor in schema.captures}
    batch = DFlashTargetBatch(tensors["hidden_states"], *(tensors[name] for name in INT64_FIELDS), **captures)
    if decode:
        return Gathered(schema, batch)
    if isinstance(schema.codec, RawCodec):
        return Gathered(schema, batch, view=view)
    encoded = {tensor.name: tensors[tensor.name] for tensor in schema.codec.crossing(schema.states)}
    beside = _beside(features, filled, schema) if isinstance(schema.codec, LayeredBlockCodec) else {}
    return Gathered(schema, batch, encoded, beside, view)


def _beside(
    features: Sequence[tuple[np.ndarray, np.ndarray]], filled: Sequence[int], schema: ShardSchema
) -> dict[str, Tensor]:
    """What a :class:`LayeredBlockCodec` decodes beside its tensors: ``features`` of all samples, at their places."""
    places, bits = (np.concatenate(parts) for parts in zip(*features, strict=True))
    as_they_are = torch.from_numpy(bits.view(f"<i{bits.itemsize}")).view(schema.states.dtype)
    return {PLACES: torch.from_numpy(places), FEATURES: as_they_are, FILLED: torch.tensor(filled)}


def widened(stored: Tensor) -> Tensor:
    """Token ids are int64 in a batch; everything else is as stored."""
    return stored.to(torch.int64) if stored.dtype == torch.int32 else stored


def _encoded(schema: ShardSchema) -> tuple[TokenTensor, ...]:
    return schema.codec.tensors(schema.states)


def _batch_dtype(tensor: TokenTensor) -> torch.dtype:
    return torch.int64 if tensor.name in INT64_FIELDS else DTYPES[tensor.dtype]


def _batch_tensors(schema: ShardSchema, view: View, decode: bool) -> list[TokenTensor]:
    """The tensors that a batch has in memory."""
    given = view.given(schema)
    states = (TokenTensor("hidden_states", DTYPE_NAMES[given.dtype], given.width),)
    encoded = {tensor.name for tensor in _encoded(schema)}
    others = [tensor for tensor in schema.token_tensors if tensor.name not in encoded]
    if not decode:
        return [*schema.codec.crossing(view.read(schema)), *others]
    return [*states, *(replace(tensor, dtype=_cast_dtype(tensor, schema, view)) for tensor in others)]


def _cast_dtype(tensor: TokenTensor, schema: ShardSchema, view: View) -> str:
    return DTYPE_NAMES[view.given(schema).dtype] if tensor.name in CAST else tensor.dtype


def _layout(in_batch: Sequence[TokenTensor], tokens: int) -> dict[str, _Place]:
    """Place of every tensor in the memory of a batch of ``tokens`` tokens, padding included."""
    places, start = {}, 0
    for tensor in in_batch:
        row_bytes = torch.int64.itemsize if tensor.name in INT64_FIELDS else tensor.row_bytes
        places[tensor.name] = _Place(start, start + tokens * row_bytes, row_bytes)
        start = -(-places[tensor.name].stop // _ALIGNMENT) * _ALIGNMENT
    return places


def _fill(piece: Piece, targets: dict[str, np.ndarray], view: View, decode: bool) -> AsTheyAre | None:
    """Read one sample to its places, ``targets``: uint8 ``[length, row_bytes]`` of each tensor of the batch; what a
    device has to put in beside."""
    schema, aside = piece.shard.schema, _Aside()
    codec = schema.codec
    if isinstance(codec, BlockCodec):
        block, is_whole = _read_block(piece, view, aside)
        stored = {BLOCKS: block} if is_whole else {}
    else:
        stored = _read_states(piece, targets, view, decode, aside)
    encoded = {tensor.name for tensor in _encoded(schema)}
    for tensor in schema.token_tensors:
        if tensor.name in encoded:
            continue
        target, dtype = targets[tensor.name], _cast_dtype(tensor, schema, view) if decode else tensor.dtype
        is_straight = tensor.name not in INT64_FIELDS and dtype == tensor.dtype
        data = target.reshape(-1) if is_straight else aside.take(piece.length * tensor.row_bytes)
        piece.shard.read_into(piece.shard.row_range(tensor.name, piece.start, piece.start + piece.length)[0], data)
        stored[tensor.name] = data
        if tensor.name in INT64_FIELDS:
            target.view(np.int64)[:, 0] = data.view(np.int32) if tensor.dtype == "I32" else data
        elif not is_straight:
            _rows(target, dtype).copy_(_rows(data.reshape(piece.length, -1), tensor.dtype))
    if piece.check is not None:
        names = [*(tensor.name for tensor in schema.token_tensors), *([BLOCKS] if schema.has_blocks else [])]
        piece.check(piece, [stored[name] for name in names] if stored.keys() >= set(names) else None)
    return _decode_block(piece, block, targets, view, decode, aside) if isinstance(codec, BlockCodec) else None


def _read_states(
    piece: Piece, targets: dict[str, np.ndarray], view: View, decode: bool, aside: _Aside
) -> dict[str, np.ndarray]:
    """Read and, with ``decode``, decode the states of one sample; the codec's tensors, if all of them were kept."""
    schema, shard, length = piece.shard.schema, piece.shard, piece.length
    codec, columns = schema.codec, {tensor.name: view.columns(schema, tensor) for tensor in _encoded(schema)}
    assert isinstance(codec, RowCodec)
    tensors = codec.tensors(view.read(schema))
    all_layers = view.layers is None or not view.by_layer(schema)
    if not decode or (isinstance(codec, RawCodec) and view.dtype is None):
        for tensor in tensors:
            shard.read_rows(tensor.name, piece.start, targets[tensor.name], columns[tensor.name])
        return {tensor.name: targets[tensor.name].reshape(-1) for tensor in tensors} if all_layers else {}
    out = _rows(targets["hidden_states"], DTYPE_NAMES[view.given(schema).dtype])
    step = max(1, _ELEMENTS // view.read(schema).width)
    if isinstance(codec, RawCodec) and all_layers and piece.check is None:
        # Cast on the way from the page cache: less work than to copy the states as they are.
        there = shard.rows_there("hidden_states", piece.start, piece.start + length)
        if there is not None:
            for first in range(0, length, step):
                out[first : first + step].copy_(_rows(there[first : first + step], tensors[0].dtype))
            return {}
    # All at once where its checksum is wanted, or where each read is a request to a store.
    read_step = step if isinstance(codec, RawCodec) else max(step, _READ_ELEMENTS // view.read(schema).width)
    at_once = length if piece.check is not None or not shard.is_local else read_step
    memory = {tensor.name: aside.take(min(at_once, length) * tensor.row_bytes) for tensor in tensors}
    for first in range(0, length, at_once):
        count = min(at_once, length - first)
        read = {t.name: memory[t.name][: count * t.row_bytes].reshape(count, t.row_bytes) for t in tensors}
        for tensor in tensors:
            shard.read_rows(tensor.name, piece.start + first, read[tensor.name], columns[tensor.name])
        decode_step = count if view.is_decoded(schema) else step
        for start in range(0, count, decode_step):
            rows = slice(start, min(start + decode_step, count))
            encoded = {t.name: _rows(read[t.name][rows], t.dtype) for t in tensors}
            _decode_rows(codec, schema, encoded, out[first + rows.start : first + rows.stop], view)
    return memory if all_layers and at_once == length else {}


def _decode_rows(codec: RowCodec, schema: ShardSchema, encoded: dict[str, Tensor], out: Tensor, view: View) -> None:
    """Decode some tokens into ``out [n, L*H]``."""
    if view.is_decoded(schema):
        codec.decode_into(encoded, out, view.read(schema))
        return
    if isinstance(codec, RawCodec):
        states = encoded["hidden_states"]
    else:
        states = torch.empty(len(out), view.read(schema).width, dtype=schema.states.dtype)
        codec.decode_into(encoded, states, view.read(schema))
    out.copy_(view.selected(states, schema))


def _read_block(piece: Piece, view: View, aside: _Aside) -> tuple[np.ndarray, bool]:
    """A sample's bytes (uint8), and whether they are all there, or those of the layers that ``view`` wants alone."""
    shard, codec = piece.shard, piece.shard.schema.codec
    offset, size = shard.block_range(shard.position_at(piece.start))
    block = aside.take(size)
    # As a whole where its checksum is wanted, or where each read is a request to a store.
    if view.layers is None or not isinstance(codec, LayeredBlockCodec) or piece.check is not None or not shard.is_local:
        shard.read_into(offset, block)
        return block, True
    with _told(piece):
        num_tokens = _num_tokens(piece)
        shard.read_into(offset, block[: codec.sizes_bytes(num_tokens, shard.schema.states)])
        ranges = codec.layer_ranges(block, num_tokens, view.layers)
    for start, stop in ranges:
        shard.read_into(offset + start, block[start:stop])
    return block, False


def _decode_block(
    piece: Piece, block: np.ndarray, targets: dict[str, np.ndarray], view: View, decode: bool, aside: _Aside
) -> AsTheyAre | None:
    """Decode a sample's block into its place, or unpack it to its places."""
    schema, num_tokens, target = piece.shard.schema, _num_tokens(piece), targets["hidden_states"]
    codec, read = schema.codec, view.read(schema)
    if not decode:
        assert isinstance(codec, LayeredBlockCodec)
        with _told(piece):
            return codec.unpack_sample(block, num_tokens, targets, read, view.layers)
    is_plain = view.is_decoded(schema)
    out = target if is_plain else aside.take(len(target) * read.row_bytes).reshape(len(target), -1)
    bits = out.view(f"<u{read.dtype.itemsize}")
    with _told(piece):
        if isinstance(codec, LayeredBlockCodec):
            codec.decode_sample(block, piece.shard.codec_head, num_tokens, bits, read, view.layers)
        else:
            assert isinstance(codec, BlockCodec)
            codec.decode_sample(block, piece.shard.codec_head, num_tokens, bits, read)
    if not is_plain:
        states, wanted = _rows(out, DTYPE_NAMES[read.dtype]), _rows(target, DTYPE_NAMES[view.given(schema).dtype])
        step = max(1, _ELEMENTS // read.width)
        for start in range(0, len(target), step):
            rows = slice(start, start + step)
            wanted[rows].copy_(view.selected(states[rows], schema))
    return None


def _num_tokens(piece: Piece) -> int:
    """Of the whole sample that a piece begins."""
    return int(piece.shard.cu_seqlens[piece.shard.position_at(piece.start) + 1]) - piece.start


@contextmanager
def _told(piece: Piece) -> Iterator[None]:
    """Name the sample whose bytes cannot be decoded."""
    try:
        yield
    except ValueError as error:
        sample = int(piece.shard.sample_ids[piece.shard.position_at(piece.start)])
        raise CacheError(piece.shard.where, f"sample {sample} cannot be decoded: {error}") from None


def _rows(data: np.ndarray, dtype: str) -> Tensor:
    """uint8 ``[n, row_bytes]`` as a tensor ``[n, width]`` that shares its memory."""
    return torch.from_numpy(data).view(DTYPES[dtype])


class _Aside:
    """Memory beside the batch that this thread uses again from sample to sample; not cleared."""

    def __init__(self) -> None:
        self._at = 0

    def take(self, size: int) -> np.ndarray:
        """uint8 ``[size]``, for as long as the sample is worked on."""
        memory: np.ndarray | None = getattr(_thread, "memory", None)
        if memory is None or self._at + size > len(memory):
            # What was taken before lives on in its views.
            memory, self._at = np.empty(max(self._at + size, 1 << 16), np.uint8), 0
            _thread.memory = memory
        taken = memory[self._at : self._at + size]
        self._at = -(-(self._at + size) // _ALIGNMENT) * _ALIGNMENT
        return taken


_thread = threading.local()
