"""What a codec is: hidden_states rows <-> the tensors that a shard stores for them.

The manifest holds ``codec.to_dict()``; a stored name maps to a class (codecs/__init__.py). There are two kinds:

- a :class:`RowCodec` stores every token on its own, in tensors with one row a token. It encodes on the device, before
  the copy to the host, and decodes wherever its tensors are.
- a :class:`BlockCodec` makes of each sample a run of bytes whose length depends on the content. It encodes and decodes
  on the host; the last step of a :class:`LayeredBlockCodec` can be done on a device.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from cache_format.codecs.dtypes import DTYPES
from cache_format.codecs.encoded_part import EncodedPart
from cache_format.codecs.places import Places

BLOCKS = "hidden_states_blocks"
BLOCK_STARTS = "hidden_states_block_starts"
"""U8 ``[Z]``: the encoded samples of a shard one after the other; I64 ``[n + 1]``: where each begins, then Z."""

ENERGY = "hidden_states_energy"
"""F64 ``[2, L]``, of lossy codecs: sum of squares of each layer's states in the shard, and of their errors."""


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


@dataclass(frozen=True, slots=True)
class HeadTensor:
    """A small tensor of a shard that is read when it is opened; its bytes are a multiple of 8."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class States:
    """What is encoded: hidden_states ``[T, layers * hidden_size]`` of ``dtype``."""

    dtype: torch.dtype
    layers: int
    hidden_size: int

    @property
    def width(self) -> int:
        """Features of a token."""
        return self.layers * self.hidden_size

    @property
    def row_bytes(self) -> int:
        """Bytes of a token before the codec."""
        return self.width * self.dtype.itemsize


class Codec(ABC):
    """What every codec has."""

    name: ClassVar[str]
    """in the manifest and of ``--codec``"""
    lossless: ClassVar[bool]
    expected_ratio: ClassVar[float]
    """stored bytes over bytes before"""
    by_layer: ClassVar[bool] = False
    """whether each layer's bytes are apart, read and decoded without the others"""
    relative_error: ClassVar[float] = 0.0
    """bound of norm(decoded - original) / norm(original) of a token's layer, beside the rounding to the stored dtype"""

    @property
    def usual_error(self) -> float:
        """The same of the median token of a sample."""
        return self.relative_error

    def tensors(self, states: States) -> tuple[TokenTensor, ...]:
        """The tensors with a row for each token that stand for hidden_states."""
        return ()

    def crossing(self, states: States) -> tuple[TokenTensor, ...]:
        """The tensors with a row for each token in which states cross to a device, to be decoded there; none where they
        are decoded on the host."""
        return self.tensors(states)

    def expected_bytes(self, num_tokens: int, states: States) -> int:
        """What that many tokens' states may take, for estimates where it depends on the content."""
        return round(num_tokens * states.row_bytes * self.expected_ratio)

    def head(self, states: States, num_samples: int) -> tuple[HeadTensor, ...]:
        """What a shard needs beside, to be decoded or to be understood."""
        return ()

    def to_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return {"name": self.name}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Codec:
        """The codec whose :meth:`to_dict` gave ``stored``.

        Raises:
            ValueError: parameters that it does not have.
        """
        codec = cls()
        if codec.to_dict() != stored:
            raise ValueError(f"codec {cls.name} has parameters that this version does not know")
        return codec

    @classmethod
    def of_quality(cls, quality: str) -> Codec:
        """The codec that ``--codec NAME:QUALITY`` asks for.

        Raises:
            ValueError: it has no such quality.
        """
        if quality:
            raise ValueError(f"codec {cls.name} has no qualities: write {cls.name} alone")
        return cls()

    @property
    def spelled(self) -> str:
        """As ``--codec`` takes it."""
        return self.name

    @property
    def asked(self) -> dict[str, Any]:
        """:meth:`to_dict` before the codec has seen any states: what a user asked for."""
        return self.to_dict()

    @property
    def is_calibrated(self) -> bool:
        """Whether it knows all of the states that it has to know to encode."""
        return True

    def calibrated(self, rows: Tensor, states: States) -> Codec:
        """The codec for states like ``rows [n, L*H]`` (on the host); a pure function of them."""
        return self

    def fits(self, states: States) -> bool:
        """Whether its parameters are of these states' shape."""
        return True


class RowCodec(Codec):
    """A codec that stores every token on its own; with ``by_layer`` a row of each of its tensors is a part for each
    layer, in order and alike."""

    @abstractmethod
    def encode(self, rows: Tensor, stored: Mapping[str, Tensor], states: States) -> Tensor | None:
        """Write ``rows [n, L*H]`` into the tensors named by ``tensors``, without waiting for the device.

        Returns:
            float64 ``[n, 2, L]`` on the rows' device: of each token and layer the energy and that of its error; None
            where lossless.
        """

    @abstractmethod
    def decode(self, stored: Mapping[str, Tensor], states: States) -> Tensor:
        """The rows ``[..., L*H]`` of tensors with any leading dimensions, on their device."""

    def decode_into(self, stored: Mapping[str, Tensor], out: Tensor, states: States) -> None:
        """The same on the host, into ``out [n, L*H]``."""
        out.copy_(self.decode(stored, states))


def total_energy(by_token: Tensor) -> Tensor:
    """``[2, L]`` of ``[n, 2, L]`` on the host: rounded once, so that it does not depend on the order of the tokens."""
    columns = by_token.flatten(1).T.tolist()
    return torch.tensor([math.fsum(column) for column in columns], dtype=torch.float64).view(by_token.shape[1:])


class BlockCodec(Codec):
    """A codec that makes of each sample a run of bytes."""

    @abstractmethod
    def shared(self, rows: np.ndarray, states: States) -> dict[str, np.ndarray]:
        """The head tensors (but ``BLOCK_STARTS``) that the samples of a shard, ``rows [T, L*H]``, share.

        ``rows`` and those of the other methods are the elements' bits: uint16 or uint32.
        """

    @abstractmethod
    def sizes_bytes(self, num_tokens: int, states: States) -> int:
        """Bytes at the beginning of a sample that say the sizes of its blocks."""

    def most_bytes(self, num_tokens: int, states: States) -> int:
        """No sample of ``num_tokens`` tokens takes more than that: as much as before, and the sizes."""
        return num_tokens * states.row_bytes + self.sizes_bytes(num_tokens, states)

    def groups(self, states: States) -> int:
        """Of each part of a sample."""
        return states.layers if self.by_layer else 1

    @abstractmethod
    def parts(self, num_tokens: int, states: States) -> list[slice]:
        """The rows of a sample that are encoded apart, by any threads: at least one part, of whole blocks, in order."""

    @abstractmethod
    def encode_part(
        self, rows: np.ndarray, shared: Mapping[str, np.ndarray], states: States, energy: np.ndarray
    ) -> EncodedPart:
        """Encode one of a sample's :meth:`parts`, ``rows [n, L*H]``. Deterministic.

        ``rows`` stay as they are until the part is written. A lossy codec writes to ``energy``, float64 ``[n, 2, L]``:
        of each token's features in each layer, and of their errors.
        """

    def encode_sample(
        self,
        rows: np.ndarray,
        shared: Mapping[str, np.ndarray],
        out: np.ndarray,
        states: States,
        energy: np.ndarray,
    ) -> int:
        """Write a sample's ``rows [n, L*H]`` into ``out`` (uint8), part by part; returns how many bytes it took."""
        parts = self.parts(len(rows), states)
        places = Places(out, [self.sizes_bytes(len(rows), states)], [len(parts)], self.groups(states))
        for number, part in enumerate(parts):
            places.put(number, self.encode_part(rows[part], shared, states, energy[part]))
        return places.starts[-1]

    @abstractmethod
    def decode_sample(
        self, stored: np.ndarray, shared: Mapping[str, np.ndarray], num_tokens: int, out: np.ndarray, states: States
    ) -> None:
        """Decode the first ``len(out)`` rows of a sample of ``num_tokens`` tokens into ``out [m, L*H]``.

        Raises:
            ValueError: ``stored`` (uint8) is not what :meth:`encode_sample` gives.
        """


PLACES, FEATURES = "hidden_states_places", "hidden_states_features"
"""I64 ``[k]``: where in a batch ``[B * S * L*H]`` features stand that cross as they are; these, of the states' dtype"""

FILLED = "hidden_states_filled"
"""I64 ``[B]``: the tokens of each row of a batch, from the left; what is behind them is padding."""

AsTheyAre = tuple[np.ndarray, np.ndarray]
"""Places (int64 ``[k]``) among the features of a sample's rows, and the bits of the features there."""


class LayeredBlockCodec(BlockCodec):
    """A codec whose blocks keep each layer apart (``by_layer``), and whose last step can be done on a device.

    ``layers``: positions of the layers wanted, in the order wanted; ``states`` are those that are given then.
    """

    by_layer = True

    @abstractmethod
    def layer_ranges(
        self, stored: np.ndarray, num_tokens: int, layers: Sequence[int] | None = None
    ) -> list[tuple[int, int]]:
        """Of each layer, where its bytes begin and end in a sample; of ``stored``, its sizes are looked at.

        Raises:
            ValueError: its sizes are damaged.
        """

    @abstractmethod
    def decode_sample(
        self,
        stored: np.ndarray,
        shared: Mapping[str, np.ndarray],
        num_tokens: int,
        out: np.ndarray,
        states: States,
        layers: Sequence[int] | None = None,
    ) -> None:
        """See :class:`BlockCodec`; of ``stored`` only the sizes and the bytes of ``layers`` are looked at."""

    @abstractmethod
    def unpack_sample(
        self,
        stored: np.ndarray,
        num_tokens: int,
        out: Mapping[str, np.ndarray],
        states: States,
        layers: Sequence[int] | None = None,
    ) -> AsTheyAre:
        """Write the first rows of a sample into ``out``: uint8 ``[m, row_bytes]`` of each tensor of :meth:`crossing`.

        Returns:
            what has to be put into the rows once :meth:`decode` has made them.

        Raises:
            ValueError: as :meth:`decode_sample`.
        """

    @abstractmethod
    def decode(self, crossed: Mapping[str, Tensor], states: States, layers: Sequence[int] | None = None) -> Tensor:
        """``[B, S, L*H]`` on the device of ``crossed``: the tensors of :meth:`crossing` ``[B, S, ...]``, ``PLACES``,
        ``FEATURES`` and ``FILLED``; the bits of :meth:`decode_sample`, and zeros where there is padding."""
