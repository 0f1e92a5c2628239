"""Codecs: rows of hidden_states <-> the per-token tensors that a shard stores for them.

A stored name maps to a class; the manifest holds ``codec.to_dict()``. A codec is a frozen dataclass with
``tensors``, ``encode``, ``decode``, ``to_dict`` and nothing else. There is one so far: ``raw``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cache_format.safetensors_file import DTYPE_NAMES, DTYPES


@dataclass(frozen=True, slots=True)
class TokenTensor:
    """A tensor of a shard with one row for each token: shape ``[T, width]``, or ``[T]`` where width is 0."""

    name: str
    dtype: str
    """safetensors name, such as BF16"""
    width: int = 0

    def shape(self, num_tokens: int) -> tuple[int, ...]:
        """Its shape in a shard of ``num_tokens`` tokens."""
        return (num_tokens, self.width) if self.width else (num_tokens,)

    @property
    def row_bytes(self) -> int:
        """Bytes a token."""
        return max(self.width, 1) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class RawCodec:
    """Bit-exact: hidden_states as they are. Reading needs no copy."""

    name = "raw"

    def tensors(self, dtype: torch.dtype, width: int) -> tuple[TokenTensor, ...]:
        """What a shard stores for hidden_states ``[T, width]`` of ``dtype``."""
        return (TokenTensor("hidden_states", DTYPE_NAMES[dtype], width),)

    def encode(self, rows: Tensor, stored: Mapping[str, Tensor]) -> None:
        """Write rows ``[T, width]`` into the tensors named by :meth:`tensors`, without waiting for the device."""
        stored["hidden_states"].copy_(rows, non_blocking=True)

    def decode(self, stored: Mapping[str, Tensor]) -> Tensor:
        """The rows ``[T, width]``; shares memory with ``stored``."""
        return stored["hidden_states"]

    def to_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return {"name": self.name}


Codec = RawCodec
CODECS = {RawCodec.name: RawCodec}


def codec_from_dict(stored: Any) -> Codec:
    """The codec that a manifest names.

    Raises:
        ValueError: unknown name or parameters; the message lists the known ones.
    """
    if not isinstance(stored, dict) or not isinstance(stored.get("name"), str) or stored["name"] not in CODECS:
        raise ValueError(f"codec {stored!r} is unknown to this version; known: {', '.join(CODECS)}")
    codec = CODECS[stored["name"]]()
    if codec.to_dict() != stored:
        raise ValueError(f"codec {stored!r} has parameters that this version does not know")
    return codec
