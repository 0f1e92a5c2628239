"""The samples of a shard, their states raw -> the shard under a codec, on the host."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, wait
from itertools import pairwise

import numpy as np
import torch

from cache_format.codecs import BlockCodec, RowCodec, States
from cache_format.codecs.interface import BLOCK_STARTS, BLOCKS
from cache_format.layout.shard_layout import ShardSchema
from cache_format.writing.shard_buffer import ShardBuffer

_RUN_BYTES = 8 << 20
"""Samples that one thread encodes at a time: to hand work over takes as long as to encode some thousand tokens."""


def encode_shard(
    schema: ShardSchema,
    number: int,
    sample_ids: np.ndarray,
    num_tokens: np.ndarray,
    raw: Mapping[str, torch.Tensor],
    into: ShardBuffer | None,
    encoders: Executor | None = None,
) -> ShardBuffer:
    """Shard ``number`` of ``schema``; a pure function of the samples and their order.

    Args:
        schema: of the shard to be made.
        number: of the shard.
        sample_ids: ``[n]``
        num_tokens: ``[n]``
        raw: what the shard would hold with the raw codec: a tensor with one row a token for each name.
        into: memory that is used again where it has the room; None: new memory.
        encoders: threads that encode the samples of a :class:`BlockCodec` side by side; None: one after the other.
    """
    codec, states = schema.codec, schema.states
    room = sum(codec.most_bytes(n, states) for n in num_tokens.tolist()) if isinstance(codec, BlockCodec) else 0
    most = schema.layout(number, len(sample_ids), int(num_tokens.sum()), room).num_bytes
    if into is None or into.capacity < most:
        into = ShardBuffer(most)
    into.begin(schema, number, sample_ids, num_tokens, room)
    encoded = {tensor.name for tensor in codec.tensors(states)}
    for tensor in schema.token_tensors:
        if tensor.name not in encoded:
            into.tensor(tensor.name).copy_(raw[tensor.name])
    rows = raw["hidden_states"]
    if isinstance(codec, RowCodec):
        energy = codec.encode(rows, {name: into.tensor(name) for name in encoded}, states)
        if energy is not None:
            into.put_energy(energy)
    if isinstance(codec, BlockCodec):
        _encode_blocks(codec, bits_of(rows, states), states, into, encoders)
    return into


def encode_buffer(
    filled: ShardBuffer, schema: ShardSchema, into: ShardBuffer | None, encoders: Executor | None = None
) -> ShardBuffer:
    """The shard that ``filled`` holds under ``schema.raw``, under ``schema``; the rest as :func:`encode_shard`."""
    ids, lengths = filled.tensor("sample_ids").numpy(), np.diff(filled.cu_seqlens)
    raw = {tensor.name: filled.tensor(tensor.name) for tensor in schema.raw.token_tensors}
    return encode_shard(schema, filled.number, ids, lengths, raw, into, encoders)


def bits_of(rows: torch.Tensor, states: States) -> np.ndarray:
    """The elements' bits, uint16 or uint32, without a copy."""
    signed = {2: torch.int16, 4: torch.int32}[states.dtype.itemsize]
    return rows.view(signed).numpy().view(f"<u{states.dtype.itemsize}")


def _encode_blocks(
    codec: BlockCodec, rows: np.ndarray, states: States, into: ShardBuffer, encoders: Executor | None
) -> None:
    shared = codec.shared(rows, states)
    for name, values in shared.items():
        into.tensor(name).numpy()[:] = values
    starts, blocks = into.tensor(BLOCK_STARTS).numpy(), into.tensor(BLOCKS).numpy()
    energies = np.zeros((len(rows) if not codec.lossless else 0, 2, states.layers))
    samples = list(pairwise(into.cu_seqlens.tolist()))

    def encode(run: range, out: np.ndarray) -> list[int]:
        """Some samples, one after the other from the beginning of ``out``; how many bytes each takes."""
        sizes, at = [], 0
        for start, stop in samples[run.start : run.stop]:
            sizes.append(codec.encode_sample(rows[start:stop], shared, out[at:], states, energies[start:stop]))
            at += sizes[-1]
        return sizes

    if encoders is None:
        sizes = encode(range(len(samples)), blocks)
    else:
        sizes, there = [], 0
        # Each run where it would stand if all before it took the most they can.
        most = [codec.most_bytes(stop - start, states) for start, stop in samples]
        rooms, runs = np.concatenate([[0], np.cumsum(most)]).tolist(), _runs(most)
        futures = [encoders.submit(encode, run, blocks[rooms[run.start] : rooms[run.stop]]) for run in runs]
        try:
            for run, future in zip(runs, futures, strict=True):
                found = future.result()
                _move(blocks, rooms[run.start], there, sum(found))
                sizes, there = sizes + found, there + sum(found)
        finally:
            # They write into this buffer.
            wait(futures)
    starts[:] = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    if not codec.lossless:
        into.put_energy(torch.from_numpy(energies))
    into.end_blocks(int(starts[-1]))


def _runs(num_bytes: Sequence[int]) -> list[range]:
    """Items of so many bytes, in runs of at least ``_RUN_BYTES``, the last apart."""
    runs, begin, size = [], 0, 0
    for number, of_item in enumerate(num_bytes, 1):
        size += of_item
        if size >= _RUN_BYTES or number == len(num_bytes):
            runs.append(range(begin, number))
            begin, size = number, 0
    return runs


def _move(memory: np.ndarray, source: int, target: int, count: int) -> None:
    """Move bytes of ``memory`` that may overlap, which numpy would do through a copy of them all."""
    if source != target:
        ctypes.memmove(memory[target:].ctypes.data, memory[source:].ctypes.data, count)
