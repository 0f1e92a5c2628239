"""What each codec makes of states: size, and error token by token; a pure function of the states."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cache_format.codecs import CODECS, BlockCodec, RowCodec, States, codec_named
from cache_format.codecs.dtypes import DTYPES
from cache_format.writing.encode import bits_of

MOST_BYTES = 32 << 20
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
    """Encode and decode ``rows [n, L*H]`` with every codec."""
    return [_tried(name, rows.contiguous(), states) for name in CODECS]


def _tried(name: str, rows: Tensor, states: States) -> CodecTrial:
    codec, before = codec_named(name), rows.numel() * rows.itemsize
    if isinstance(codec, BlockCodec):
        bits = bits_of(rows, states)
        out = np.empty(codec.most_bytes(len(rows), states), np.uint8)
        return CodecTrial(
            codec=name,
            ratio=codec.encode_sample(bits, codec.shared(bits, states), out) / before,
            snr_db=[],
            worst_db=[],
        )
    assert isinstance(codec, RowCodec)
    tensors = codec.tensors(states)
    stored = {t.name: torch.empty(t.shape(len(rows)), dtype=DTYPES[t.dtype]) for t in tensors}
    ratio = sum(t.row_bytes for t in tensors) / states.row_bytes
    if codec.lossless:
        return CodecTrial(codec=name, ratio=ratio, snr_db=[], worst_db=[])
    codec.encode(rows, stored, states)
    by_token = snr(rows, codec.decode(stored, states), states.layers)
    median = by_token.nanmedian(dim=0).values
    worst = torch.where(by_token.isnan(), torch.inf, by_token).amin(dim=0)
    return CodecTrial(
        codec=name,
        ratio=ratio,
        snr_db=[float(x) for x in median.nan_to_num(0.0)],
        worst_db=[float(x) for x in worst.clamp(max=200.0)],
    )


def snr(rows: Tensor, decoded: Tensor, layers: int) -> Tensor:
    """float64 ``[n, L]``, in dB; 200 where a token is exact, NaN where it is all zeros."""
    before = rows.double().unflatten(1, (layers, -1))
    energy = before.square().sum(2)
    error = (decoded.double().unflatten(1, (layers, -1)) - before).square().sum(2)
    return torch.where(energy > 0, (10 * (energy / error).log10()).clamp(max=200.0), torch.nan)
