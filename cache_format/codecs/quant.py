"""quant: each channel's mean is taken off, one step a token and layer rounds all its channels, Huffman codes the rest.

A step follows the token: a fixed share of the mean |feature - mean of its channel|, a measure that neither a massive
activation nor a channel that is loud in every token can pull up. One step for all channels spends the bits where the
energy is, and channels of like spread are coded together (three groups). How large the share is, the SNR asked for
decides: it is found for each layer from the first rows of the cache's first shards (quant_statistics.py) and stands,
with means and groups, in the manifest. A feature that is further away than int8 counts is stored as it is: nothing is
clipped.

A sample is stored layer by layer, each in blocks of whole rows that fit a core's cache. Bytes of a sample: a uint32
for each block, its bytes; then block by block, layer by layer:

    steps      bfloat16 a row
    escapes    uint32, how many features are stored as they are
    sizes      uint32 a group, of its coded symbols
    symbols    group by group, int8 of each row's features of that group: steps from the mean
    places     uint32 each, row * H + channel of the features that are stored as they are, ascending
    features   these

A block that does not get smaller is stored as it is; its size says so. Error of a feature: 0.5001 steps and the
rounding of a float32 sum; then the rounding to the stored dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache_format.codecs.encoded_part import EncodedPart, write_all
from cache_format.codecs.interface import (
    BLOCK_STARTS,
    ENERGY,
    FEATURES,
    FILLED,
    PLACES,
    AsTheyAre,
    Codec,
    HeadTensor,
    LayeredBlockCodec,
    States,
    TokenTensor,
)
from cache_format.codecs.quant_decode import decode, decode_on_device, unpack
from cache_format.codecs.quant_encode import encoded
from cache_format.codecs.quant_layers import QuantLayers
from cache_format.codecs.quant_statistics import Statistics, statistics_for
from cache_format.codecs.row_runs import row_runs

BLOCK_ELEMENTS = 1 << 17
"""A block has as many rows of a layer as hold at most this many features, and at least one."""

_AT_ONCE = 2
"""Blocks of each layer that one thread encodes at a time."""

STEPS = "hidden_states_steps"
"""BF16 ``[B, S, L]`` beside ``hidden_states`` U8 ``[B, S, L*H]`` (the bits of int8), for a device."""

QUALITIES = {"": 30.0, "fine": 37.0}
"""``--codec quant`` and ``quant:fine``: the SNR of a layer's median token, in dB."""
LEAST_DB, MOST_DB = 10.0, 60.0


@dataclass(frozen=True)
class QuantCodec(LayeredBlockCodec):
    """Stores ``hidden_states_blocks``; measured on bfloat16 states of a real LLM: 0.28 of raw at 30 dB."""

    name = "quant"
    lossless = False
    expected_ratio = 0.28
    """of bfloat16, at 30 dB"""

    snr_db: float = QUALITIES[""]
    """asked for: of the median token of each layer"""
    statistics: Statistics | None = None
    """None: the states have not been seen yet, and nothing can be encoded or decoded"""

    def expected_bytes(self, num_tokens: int, states: States) -> int:
        """A bit a feature for each 6.02 dB, whatever the states' dtype."""
        bits = 16 * self.expected_ratio + (self.snr_db - QUALITIES[""]) / 6.02
        return round(num_tokens * states.width * bits / 8)

    @property
    def relative_error(self) -> float:  # type: ignore[override]
        """Of the worst tokens: 5 dB less than the median in a real LLM, and as much again for others."""
        return float(10 ** ((10.0 - self.snr_db) / 20))

    @property
    def usual_error(self) -> float:
        """Of a sample's median token: 2.5 dB less than asked for in the worst of 300 samples of a real LLM."""
        return float(10 ** ((4.0 - self.snr_db) / 20))

    @classmethod
    def of_quality(cls, quality: str) -> QuantCodec:
        """``""``, ``fine``, or an SNR such as ``34dB``."""
        text = quality.lower().removesuffix("db").strip()
        try:
            return cls(QUALITIES[quality] if quality in QUALITIES else float(text))
        except ValueError as error:
            raise ValueError(
                f"codec quant:{quality}: write quant, quant:fine, or an SNR of {LEAST_DB:.0f} to {MOST_DB:.0f} dB such "
                f"as quant:34dB ({error})"
            ) from None

    def __post_init__(self) -> None:
        if not LEAST_DB <= self.snr_db <= MOST_DB:
            raise ValueError(f"an SNR of {self.snr_db} dB is not one of {LEAST_DB:.0f} to {MOST_DB:.0f}")

    @property
    def spelled(self) -> str:
        """With the SNR."""
        return f"{self.name}:{self.snr_db:g}dB"

    @property
    def asked(self) -> dict[str, Any]:
        """Name and SNR."""
        return {"name": self.name, "snr_db": self.snr_db}

    def to_dict(self) -> dict[str, Any]:
        """Beside what was asked for, once they are known, the statistics."""
        return self.asked | ({} if self.statistics is None else asdict(self.statistics))

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> QuantCodec:
        """See :meth:`Codec.from_dict`."""
        parameters = {name: value for name, value in stored.items() if name != "name"}
        snr_db = parameters.pop("snr_db", None)
        if not isinstance(snr_db, float):
            raise ValueError(f"codec {cls.name} has no snr_db")
        return cls(snr_db, Statistics.from_dict(parameters) if parameters else None)

    @property
    def is_calibrated(self) -> bool:
        """Whether it has statistics."""
        return self.statistics is not None

    def calibrated(self, rows: Tensor, states: States) -> Codec:
        """With the statistics of ``rows``."""
        return replace(self, statistics=statistics_for(rows, states, self.snr_db))

    def fits(self, states: States) -> bool:
        """Whether the statistics are of L layers of H channels."""
        return self.statistics is None or self.statistics.shape == (states.layers, states.hidden_size)

    def head(self, states: States, num_samples: int) -> tuple[HeadTensor, ...]:
        """Where samples begin, and the energies."""
        return (HeadTensor(BLOCK_STARTS, "I64", (num_samples + 1,)), HeadTensor(ENERGY, "F64", (2, states.layers)))

    def shared(self, rows: np.ndarray, states: States) -> dict[str, np.ndarray]:
        """Nothing: the statistics are the whole cache's."""
        return {}

    def sizes_bytes(self, num_tokens: int, states: States) -> int:
        """4 for each block of each layer."""
        return 4 * states.layers * len(_blocks(num_tokens, states.hidden_size))

    def parts(self, num_tokens: int, states: States) -> list[slice]:
        """Some blocks of each layer."""
        return row_runs(num_tokens, _AT_ONCE * _block_rows(states.hidden_size)) or [slice(0, 0)]

    def encode_part(
        self, rows: np.ndarray, shared: Mapping[str, np.ndarray], states: States, energy: np.ndarray
    ) -> EncodedPart:
        """See the top of the file."""
        blocks = _blocks(len(rows), states.hidden_size)
        found = [encoded(self._layers(), rows[block], energy[block], states.dtype) for block in blocks]
        of_layers = [[block[layer] for block in found] for layer in range(states.layers)]
        sizes = np.array([[sum(piece.nbytes for piece in block) for block in layer] for layer in of_layers], "<u4")
        pieces = [list(chain.from_iterable(layer)) for layer in of_layers]
        return _Part(sizes.reshape(states.layers, -1), sizes.sum(1, dtype=np.int64).tolist(), pieces)

    def crossing(self, states: States) -> tuple[TokenTensor, ...]:
        """Symbols and steps: a bit over half the bytes of bfloat16 states."""
        return (TokenTensor("hidden_states", "U8", states.width), TokenTensor(STEPS, "BF16", states.layers))

    def layer_ranges(
        self, stored: np.ndarray, num_tokens: int, layers: Sequence[int] | None = None
    ) -> list[tuple[int, int]]:
        """See :class:`LayeredBlockCodec`: a layer's blocks lie together."""
        ends, at_once = self._ends(stored, num_tokens), len(_blocks(num_tokens, self._shape[1]))
        chosen = range(self._shape[0]) if layers is None else layers
        return [(int(ends[layer * at_once]), int(ends[(layer + 1) * at_once])) for layer in chosen]

    def decode_sample(
        self,
        stored: np.ndarray,
        shared: Mapping[str, np.ndarray],
        num_tokens: int,
        out: np.ndarray,
        states: States,
        layers: Sequence[int] | None = None,
    ) -> None:
        """See the top of the file."""
        chosen = self._layers(layers)
        for rows, blocks, count in self._each_block(stored, num_tokens, len(out), chosen):
            decode(chosen, blocks, count, out[rows], states.dtype)

    def unpack_sample(
        self,
        stored: np.ndarray,
        num_tokens: int,
        out: Mapping[str, np.ndarray],
        states: States,
        layers: Sequence[int] | None = None,
    ) -> AsTheyAre:
        """Entropy decoding; the rest, :meth:`decode` does."""
        chosen, itemsize = self._layers(layers), states.dtype.itemsize
        symbols, steps = out["hidden_states"].view(np.int8), out[STEPS].view("<u2")
        places, features = [np.empty(0, np.int64)], [np.empty(0, f"<u{itemsize}")]
        for rows, blocks, count in self._each_block(stored, num_tokens, len(symbols), chosen):
            for row, column, values in unpack(chosen, blocks, count, symbols[rows], steps[rows], itemsize):
                at = np.arange(rows.start, rows.stop)[row] * states.width
                places.append(((at[:, None] if values.ndim == 2 else at) + np.arange(states.width)[column]).reshape(-1))
                features.append(values.reshape(-1))
        return np.concatenate(places), np.concatenate(features)

    def decode(self, crossed: Mapping[str, Tensor], states: States, layers: Sequence[int] | None = None) -> Tensor:
        """See :class:`LayeredBlockCodec`. A step times a symbol is exact in float32, so that one rounding, that of the
        sum, comes before the one to the stored dtype: the same bits on every device that adds as IEEE 754 says.
        """
        symbols, steps = crossed["hidden_states"].view(torch.int8), crossed[STEPS]
        places, features = crossed[PLACES], crossed[FEATURES]
        return decode_on_device(self._layers(layers), symbols, steps, crossed[FILLED], places, features, states.dtype)

    def _each_block(
        self, stored: np.ndarray, num_tokens: int, wanted: int, layers: QuantLayers
    ) -> Iterator[tuple[slice, list[np.ndarray], int]]:
        """Of the blocks that hold the first ``wanted`` rows: those of them, a block of each layer, its rows."""
        ends, blocks = self._ends(stored, num_tokens), _blocks(num_tokens, self._shape[1])
        for number, block in enumerate(blocks):
            if block.start < wanted:
                places = [layer * len(blocks) + number for layer in layers.chosen]
                of_layers = [stored[ends[place] : ends[place + 1]] for place in places]
                yield slice(block.start, min(block.stop, wanted)), of_layers, block.stop - block.start

    def _ends(self, stored: np.ndarray, num_tokens: int) -> np.ndarray:
        """Where the sizes end, and each block, layer by layer."""
        layers, hidden_size = self._shape
        size = 4 * layers * len(_blocks(num_tokens, hidden_size))
        sizes = stored[:size]
        if len(sizes) != size:
            raise ValueError("the sizes of its blocks are cut off")
        ends = np.cumsum([size, *sizes.view("<u4").tolist()], dtype=np.int64)
        if ends[-1] != len(stored):
            raise ValueError(f"it has {len(stored):,} bytes, its blocks {int(ends[-1]):,}")
        return ends

    @property
    def _shape(self) -> tuple[int, int]:
        return self._layers().shape

    def _layers(self, layers: Sequence[int] | None = None) -> QuantLayers:
        """Those of the statistics, or ``layers`` of them: made once."""
        if self.statistics is None:
            raise ValueError(f"codec {self.name} has not seen the states yet")
        chosen = tuple(range(len(self.statistics.step)) if layers is None else layers)
        made: dict[tuple[int, ...], QuantLayers] = self.__dict__.setdefault("_made", {})
        if chosen not in made:
            made[chosen] = QuantLayers(self.statistics, chosen)
        return made[chosen]


@dataclass(frozen=True, slots=True)
class _Part(EncodedPart):
    pieces: list[list[np.ndarray]]
    """of each layer's blocks"""

    def write(self, group: int, out: np.ndarray) -> None:
        """See :class:`EncodedPart`."""
        write_all(out, self.pieces[group])


def _block_rows(hidden_size: int) -> int:
    return max(1, BLOCK_ELEMENTS // hidden_size)


def _blocks(num_tokens: int, hidden_size: int) -> list[slice]:
    """The rows of each block of a layer."""
    return row_runs(num_tokens, _block_rows(hidden_size))
