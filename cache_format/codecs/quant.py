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

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
from torch import Tensor

from cache_format.codecs.interface import BLOCK_STARTS, ENERGY, BlockCodec, Codec, HeadTensor, States
from cache_format.codecs.quant_layers import QuantLayers
from cache_format.codecs.quant_statistics import Statistics, statistics_for

BLOCK_ELEMENTS = 1 << 17
"""A block has as many rows of a layer as hold at most this many features, and at least one."""

QUALITIES = {"": 30.0, "fine": 37.0}
"""``--codec quant`` and ``quant:fine``: the SNR of a layer's median token, in dB."""
LEAST_DB, MOST_DB = 10.0, 60.0


@dataclass(frozen=True)
class QuantCodec(BlockCodec):
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

    def most_bytes(self, num_tokens: int, states: States) -> int:
        """As much as before, and 4 bytes a block."""
        return num_tokens * states.row_bytes + 4 * states.layers * len(list(_blocks(num_tokens, states.hidden_size)))

    def encode_sample(
        self,
        rows: np.ndarray,
        shared: Mapping[str, np.ndarray],
        out: np.ndarray,
        states: States,
        energy: np.ndarray,
    ) -> int:
        """See the top of the file."""
        blocks = list(_blocks(len(rows), states.hidden_size))
        found = [self._all_layers.encoded(rows[block], energy[block], states.dtype) for block in blocks]
        # Layer by layer, so that one layer's bytes lie together.
        in_order = [block for of_layer in zip(*found, strict=True) for block in of_layer]
        sizes = np.array([sum(part.nbytes for part in block) for block in in_order], "<u4")
        at = 0
        for part in (sizes, *chain.from_iterable(in_order)):
            raw = part.reshape(-1).view(np.uint8)
            out[at : at + len(raw)] = raw
            at += len(raw)
        return at

    def decode_sample(
        self, stored: np.ndarray, shared: Mapping[str, np.ndarray], num_tokens: int, out: np.ndarray, states: States
    ) -> None:
        """See the top of the file."""
        blocks = list(_blocks(num_tokens, states.hidden_size))
        count = len(blocks) * states.layers
        sizes = stored[: 4 * count]
        if len(sizes) != 4 * count:
            raise ValueError("the sizes of its blocks are cut off")
        ends = np.cumsum([4 * count, *sizes.view("<u4").tolist()], dtype=np.int64)
        if ends[-1] != len(stored):
            raise ValueError(f"it has {len(stored):,} bytes, its blocks {int(ends[-1]):,}")
        layers = self._all_layers
        for number, block in enumerate(blocks):
            if block.start < len(out):
                places = [layer * len(blocks) + number for layer in layers.chosen]
                of_layers = [stored[ends[place] : ends[place + 1]] for place in places]
                layers.decode(of_layers, block.stop - block.start, out[block], states.dtype)

    @cached_property
    def _all_layers(self) -> QuantLayers:
        if self.statistics is None:
            raise ValueError(f"codec {self.name} has not seen the states yet")
        return QuantLayers(self.statistics, range(len(self.statistics.step)))


def _blocks(num_tokens: int, hidden_size: int) -> Iterator[slice]:
    """The rows of each block of a layer."""
    rows = max(1, BLOCK_ELEMENTS // hidden_size)
    return (slice(start, min(start + rows, num_tokens)) for start in range(0, num_tokens, rows))
