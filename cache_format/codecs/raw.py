"""raw: the states as they are. Bit-exact; reading needs no copy. The default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from cache_format.codecs.dtypes import DTYPE_NAMES
from cache_format.codecs.interface import RowCodec, States, TokenTensor


@dataclass(frozen=True)
class RawCodec(RowCodec):
    """Stores hidden_states ``[T, L*H]`` in their own dtype."""

    name = "raw"
    lossless = True
    by_layer = True
    expected_ratio = 1.0

    def tensors(self, states: States) -> tuple[TokenTensor, ...]:
        """``hidden_states``."""
        return (TokenTensor("hidden_states", DTYPE_NAMES[states.dtype], states.width),)

    def encode(self, rows: Tensor, stored: Mapping[str, Tensor], states: States) -> None:
        """Copy."""
        stored["hidden_states"].copy_(rows, non_blocking=True)

    def decode(self, stored: Mapping[str, Tensor], states: States) -> Tensor:
        """The rows themselves; shares memory with ``stored``."""
        return stored["hidden_states"]
