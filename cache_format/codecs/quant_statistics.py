"""What the quant codec has to know of a cache's states before it encodes them: found once, kept in the manifest.

Read from some rows (which ones, upkeep and job say); tokens of more than four times the median norm, such as first
tokens, are left out: they would be all that a mean or a spread is made of.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache_format.codecs.interface import States

GROUPS = 3
_LOUD, _VERY_LOUD = 2**0.3, 2**1.2
"""A channel's group: its spread as a multiple of the layer's median channel. Measured on a real LLM at 30 dB: 4.48
bits a feature with these, 4.65 with one group, 4.49 with four of equal size, each sample's tables counted."""

MASSIVE = 4.0
"""A token of so many times the median norm is left out."""


FIRST_STEP = 0.25
"""Where the search begins; about 30 dB."""


@dataclass(frozen=True)
class CalibrationShare:
    """Which rows statistics are read from: the first ``rows`` of each of the first ``shards`` shards.

    Only of samples that are stored, so that extract and a later recode see the same.
    """

    shards: int
    rows: int

    @staticmethod
    def of(num_shards: int) -> CalibrationShare:
        """For a cache of so many shards: up to 4,096 rows."""
        shards = max(1, min(8, num_shards))
        return CalibrationShare(shards, 4096 // shards)


@dataclass(frozen=True)
class Statistics:
    """Of L layers of H channels. Arrays are base64 of little-endian bytes, so that the manifest's JSON holds them."""

    step: list[float]
    """of each layer: a token's step as a multiple of its mean |feature - mean|; float32 values"""
    mean: str
    """bfloat16 ``[L, H]``"""
    group: str
    """uint8 ``[L, H]``, 0 .. 2: which channels are coded together"""

    def __post_init__(self) -> None:
        if not all(np.isfinite(step) and 0 < step < 1e6 for step in self.step) or not self.step:
            raise ValueError("the steps of codec quant are not positive numbers")
        mean, group = (_bytes(text) for text in (self.mean, self.group))
        if len(mean) != 2 * len(group) or not len(group) or len(group) % len(self.step):
            raise ValueError("mean and group of codec quant are not of the same channels")
        if max(group) >= GROUPS:
            raise ValueError(f"codec quant has {GROUPS} groups of channels")
        if not np.isfinite(self.means()).all():
            raise ValueError("the means of codec quant are not finite")

    @property
    def shape(self) -> tuple[int, int]:
        """L, H."""
        return len(self.step), len(_bytes(self.group)) // len(self.step)

    def means(self) -> np.ndarray:
        """float32 ``[L, H]``."""
        bits = np.frombuffer(_bytes(self.mean), "<u2").astype(np.uint32) << 16
        return bits.view(np.float32).reshape(len(self.step), -1)

    def groups(self) -> np.ndarray:
        """uint8 ``[L, H]``."""
        return np.frombuffer(_bytes(self.group), np.uint8).reshape(len(self.step), -1)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Statistics:
        """Of the fields of a manifest's codec.

        Raises:
            ValueError: they are not what is said above.
        """
        kinds = {"step": list, "mean": str, "group": str}
        if set(stored) != set(kinds) or not all(isinstance(stored[name], kind) for name, kind in kinds.items()):
            raise ValueError("codec quant has parameters that this version does not know")
        if not all(isinstance(step, float) for step in stored["step"]):
            raise ValueError("the steps of codec quant are not numbers")
        return cls(**stored)


def statistics_for(rows: Tensor, states: States, snr_db: float) -> Statistics:
    """Of ``rows [n, L*H]`` on the host, with steps that give the median of their tokens ``snr_db`` in each layer.

    Deterministic. Rows that are not finite are left out; without any that is left, means are 0 and steps a guess.
    """
    found = [
        _of_layer(layer, states.dtype, snr_db) for layer in rows.view(-1, states.layers, states.hidden_size).unbind(1)
    ]
    steps, means, groups = zip(*found, strict=True)
    bits = torch.stack(means).view(torch.int16).numpy().astype("<i2")
    return Statistics(list(steps), _text(bits), _text(np.stack(groups)))


def _of_layer(layer: Tensor, dtype: torch.dtype, snr_db: float) -> tuple[float, Tensor, np.ndarray]:
    """Step, bfloat16 means ``[H]`` and groups ``[H]`` of ``[n, H]``."""
    rows = layer.double()
    norms = torch.linalg.vector_norm(rows, dim=1)
    # The squares of larger ones would not be finite in float32.
    rows, norms = (x[norms < 1e15] for x in (rows, norms))
    if not len(rows):
        return FIRST_STEP, torch.zeros(layer.shape[1], dtype=torch.bfloat16), np.zeros(layer.shape[1], np.uint8)
    rows = rows[norms <= MASSIVE * norms.median()]
    mean = rows.mean(0)
    spread = (rows - mean).square_().mean(0).sqrt_().numpy()
    middle = np.median(spread)
    group = np.digitize(spread, (_LOUD * middle, _VERY_LOUD * middle)) if middle > 0 else np.zeros(len(spread))
    stored = mean.to(torch.bfloat16)
    return _step(rows.float(), stored.float(), dtype, snr_db), stored, group.astype(np.uint8)


def _step(rows: Tensor, mean: Tensor, dtype: torch.dtype, snr_db: float) -> float:
    """The step at which half of the tokens have at least ``snr_db``; at most eight approaches to it."""
    sizes = (rows - mean).abs().mean(1, keepdim=True)
    energy, step = rows.square().sum(1, dtype=torch.float64), FIRST_STEP
    for _ in range(8):
        steps = (sizes * step).to(torch.bfloat16).float()
        symbols = ((rows - mean) / steps.clamp_min(torch.finfo(torch.float32).tiny)).round_()
        errors = torch.addcmul(mean, symbols, steps).to(dtype).float() - rows
        ratio = energy / errors.square().sum(1, dtype=torch.float64).clamp_min(1e-300)
        reached = float(10 * torch.log10(ratio.clamp(1e-30, 1e30)).median())
        if 0 <= reached - snr_db < 0.02:
            break
        step = float(np.float32(np.clip(step * 10 ** ((reached - snr_db - 0.01) / 20), 1e-4, 2.0)))
    return step


def _text(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()


def _bytes(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("the statistics of codec quant are not base64") from None
