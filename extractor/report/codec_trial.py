"""What each codec makes of states: size, and error token by token; a pure function of the states."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cache_format.codecs import CODECS, BlockCodec, Codec, RowCodec, States, codec_named
from cache_format.codecs.dtypes import DTYPES
from cache_format.writing.encode import bits_of

MOST_BYTES = 16 << 20
"""Of states that are tried: seconds of one core."""


@dataclass(frozen=True, kw_only=True)
class CodecTrial:
    """One codec."""

    codec: str
    ratio: float
    """stored bytes over bytes before"""
    snr_db: list[float]
    """signal-to-noise ratio of each layer, the median of the tokens, in dB; empty where the bits are the same"""
    worst_db: list[float]
    """of the token where it is lowest: an average would let first tokens, which carry most energy, hide the others"""


def try_codecs(rows: Tensor, states: States) -> list[CodecTrial]:
    """Encode and decode ``rows [n, L*H]`` with every codec; one that has to know the states knows these."""
    contiguous = rows.contiguous()
    return [_tried(name, contiguous, states) for name in (*CODECS, "quant:fine")]


def _tried(name: str, rows: Tensor, states: States) -> CodecTrial:
    codec = codec_named(name)
    codec = codec if codec.is_calibrated else codec.calibrated(rows, states)
    num_bytes, decoded = (_by_sample if isinstance(codec, BlockCodec) else _by_row)(codec, rows, states)
    ratio = num_bytes / (rows.numel() * rows.itemsize)
    if codec.lossless:
        return CodecTrial(codec=name, ratio=ratio, snr_db=[], worst_db=[])
    by_token = snr(rows, decoded, states.layers)
    median = by_token.nanmedian(dim=0).values
    worst = torch.where(by_token.isnan(), torch.inf, by_token).amin(dim=0)
    return CodecTrial(
        codec=name,
        ratio=ratio,
        snr_db=[float(x) for x in median.nan_to_num(0.0)],
        worst_db=[float(x) for x in worst.clamp(max=200.0)],
    )


def _by_sample(codec: Codec, rows: Tensor, states: States) -> tuple[int, Tensor]:
    """Stored bytes and, where they may differ, the decoded rows."""
    assert isinstance(codec, BlockCodec)
    bits, decoded = bits_of(rows, states), torch.empty_like(rows)
    shared, out = codec.shared(bits, states), np.empty(codec.most_bytes(len(rows), states), np.uint8)
    size = codec.encode_sample(bits, shared, out, states, np.zeros((len(rows), 2, states.layers)))
    if not codec.lossless:
        codec.decode_sample(out[:size], shared, len(rows), bits_of(decoded, states), states)
    return size, decoded


def _by_row(codec: Codec, rows: Tensor, states: States) -> tuple[int, Tensor]:
    assert isinstance(codec, RowCodec)
    tensors = codec.tensors(states)
    if codec.lossless:
        return sum(t.row_bytes for t in tensors) * len(rows), rows
    stored = {t.name: torch.empty(t.shape(len(rows)), dtype=DTYPES[t.dtype]) for t in tensors}
    codec.encode(rows, stored, states)
    return sum(t.row_bytes for t in tensors) * len(rows), codec.decode(stored, states)


def snr(rows: Tensor, decoded: Tensor, layers: int) -> Tensor:
    """float64 ``[n, L]``, in dB; 200 where a token is exact, NaN where it is all zeros."""
    before = rows.double().unflatten(1, (layers, -1))
    energy = before.square().sum(2)
    error = (decoded.double().unflatten(1, (layers, -1)) - before).square().sum(2)
    return torch.where(energy > 0, (10 * (energy / error).log10()).clamp(max=200.0), torch.nan)
