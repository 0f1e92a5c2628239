"""The samples of a shard, their states raw -> the shard under a codec, on the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Executor, Future, wait

import numpy as np
import torch

from cache_format.codecs import BlockCodec, RowCodec, States
from cache_format.codecs.interface import BLOCK_STARTS, BLOCKS
from cache_format.codecs.places import Places
from cache_format.layout.shard_layout import ShardSchema
from cache_format.writing.shard_buffer import ShardBuffer

_RUN_BYTES = 1 << 20
"""What one thread encodes at a time, at least; parts of long samples are larger. Measured: with less, handing over
takes too long; with more, parts wait for those before them, and are written when they lie in no cache any more."""


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
        encoders: threads that encode parts of a :class:`BlockCodec`'s samples side by side; None: one after the other.
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
    energies = np.zeros((len(rows) if not codec.lossless else 0, 2, states.layers))
    begins, lengths = into.cu_seqlens[:-1].tolist(), np.diff(into.cu_seqlens).tolist()
    of_samples = [codec.parts(length, states) for length in lengths]
    parts = [
        slice(begin + part.start, begin + part.stop)
        for begin, of_sample in zip(begins, of_samples, strict=True)
        for part in of_sample
    ]
    sizes_bytes = [codec.sizes_bytes(length, states) for length in lengths]
    places = Places(into.tensor(BLOCKS).numpy(), sizes_bytes, list(map(len, of_samples)), codec.groups(states))

    def encode(run: range) -> None:
        for number in run:
            places.put(number, codec.encode_part(rows[parts[number]], shared, states, energies[parts[number]]))

    runs = _runs([(part.stop - part.start) * states.row_bytes for part in parts])
    if encoders is None:
        for run in runs:
            encode(run)
    else:
        _side_by_side(encode, runs, encoders)
    into.tensor(BLOCK_STARTS).numpy()[:] = places.starts
    if not codec.lossless:
        into.put_energy(torch.from_numpy(energies))
    into.end_blocks(places.starts[-1])


def _side_by_side(encode: Callable[[range], None], runs: Sequence[range], encoders: Executor) -> None:
    """Each run by one of the threads; none of them is at work any more when this returns, or raises."""
    futures: list[Future[None]] = []
    try:
        for run in runs:
            futures.append(encoders.submit(encode, run))
        wait(futures, return_when=FIRST_EXCEPTION)
    finally:
        for future in futures:
            future.cancel()
        wait(futures)
    # Of several errors, that of the first part.
    for future in futures:
        if not future.cancelled():
            future.result()


def _runs(num_bytes: Sequence[int]) -> list[range]:
    """Items of so many bytes, in runs of at least ``_RUN_BYTES``, the last apart."""
    runs, begin, size = [], 0, 0
    for number, of_item in enumerate(num_bytes, 1):
        size += of_item
        if size >= _RUN_BYTES or number == len(num_bytes):
            runs.append(range(begin, number))
            begin, size = number, 0
    return runs
