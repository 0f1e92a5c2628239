"""The samples of a shard, their states raw -> the shard under a codec, on the host."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from cache_format.codecs import BlockCodec, RowCodec, States
from cache_format.codecs.interface import BLOCK_STARTS, BLOCKS, ENERGY
from cache_format.layout.shard_layout import ShardSchema
from cache_format.writing.shard_buffer import ShardBuffer


def encode_shard(
    schema: ShardSchema,
    number: int,
    sample_ids: np.ndarray,
    num_tokens: np.ndarray,
    raw: Mapping[str, torch.Tensor],
    into: ShardBuffer | None,
) -> ShardBuffer:
    """Shard ``number`` of ``schema``; a pure function of the samples and their order.

    Args:
        schema: of the shard to be made.
        number: of the shard.
        sample_ids: ``[n]``
        num_tokens: ``[n]``
        raw: what the shard would hold with the raw codec: a tensor with one row a token for each name.
        into: memory that is used again where it has the room; None: new memory.
    """
    codec, states = schema.codec, schema.states
    most = _most_bytes(schema, number, len(sample_ids), int(num_tokens.sum()))
    if into is None or into.capacity < most:
        into = ShardBuffer(most)
    room = sum(codec.most_bytes(n, states) for n in num_tokens.tolist()) if isinstance(codec, BlockCodec) else 0
    into.begin(schema, number, sample_ids, num_tokens, room)
    encoded = {tensor.name for tensor in codec.tensors(states)}
    for tensor in schema.token_tensors:
        if tensor.name not in encoded:
            into.tensor(tensor.name).copy_(raw[tensor.name])
    rows = raw["hidden_states"]
    if isinstance(codec, RowCodec):
        energy = codec.encode(rows, {name: into.tensor(name) for name in encoded}, states)
        if energy is not None:
            into.tensor(ENERGY).copy_(energy)
    if isinstance(codec, BlockCodec):
        _encode_blocks(codec, bits_of(rows, states), states, into)
    return into


def encode_buffer(filled: ShardBuffer, schema: ShardSchema, into: ShardBuffer | None) -> ShardBuffer:
    """The shard that ``filled`` holds under ``schema.raw``, under ``schema``; in ``into`` if it has the room."""
    ids, lengths = filled.tensor("sample_ids").numpy(), np.diff(filled.cu_seqlens)
    raw = {tensor.name: filled.tensor(tensor.name) for tensor in schema.raw.token_tensors}
    return encode_shard(schema, filled.number, ids, lengths, raw, into)


def _most_bytes(schema: ShardSchema, number: int, num_samples: int, num_tokens: int) -> int:
    """What a shard takes at most; a block has at least one token and takes 4 bytes beside."""
    return schema.layout(number, num_samples, num_tokens, num_tokens * (schema.states.row_bytes + 4)).num_bytes


def bits_of(rows: torch.Tensor, states: States) -> np.ndarray:
    """The elements' bits, uint16 or uint32, without a copy."""
    signed = {2: torch.int16, 4: torch.int32}[states.dtype.itemsize]
    return rows.view(signed).numpy().view(f"<u{states.dtype.itemsize}")


def _encode_blocks(codec: BlockCodec, rows: np.ndarray, states: States, into: ShardBuffer) -> None:
    shared = codec.shared(rows, states)
    for name, values in shared.items():
        into.tensor(name).numpy()[:] = values
    starts, blocks = into.tensor(BLOCK_STARTS).numpy(), into.tensor(BLOCKS).numpy()
    starts[0] = 0
    for i, (start, stop) in enumerate(zip(into.cu_seqlens, into.cu_seqlens[1:], strict=False)):
        starts[i + 1] = starts[i] + codec.encode_sample(rows[start:stop], shared, blocks[starts[i] :])
    into.end_blocks(int(starts[-1]))
