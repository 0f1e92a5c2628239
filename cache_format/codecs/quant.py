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

import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache_format.codecs.entropy import coder
from cache_format.codecs.interface import BLOCK_STARTS, ENERGY, BlockCodec, Codec, HeadTensor, States
from cache_format.codecs.quant_statistics import GROUPS, Statistics, statistics_for

BLOCK_ELEMENTS = 1 << 17
"""A block has as many rows of a layer as hold at most this many features, and at least one."""

QUALITIES = {"": 30.0, "fine": 37.0}
"""``--codec quant`` and ``quant:fine``: the SNR of a layer's median token, in dB."""
LEAST_DB, MOST_DB = 10.0, 60.0

_AT_ONCE = 1 << 17
"""Features that are worked on at a time."""

_LEAST_STEP, _LARGEST_STEP = 2.0**-100, 2.0**100
"""Steps beyond these could not be divided by, or squared: their rows are stored as they are."""

_MOST_FLOAT16 = 32768.0
"""Larger features of float16 are stored as they are: decoded, they might be rounded up to Inf."""


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
        sizes, at = np.empty(len(blocks) * states.layers, "<u4"), 4 * len(blocks) * states.layers
        for number, (layer, block) in enumerate((layer, block) for layer in self._layers for block in blocks):
            part = layer.columns(rows[block])
            for data in layer.encoded(part, energy[:, layer.number], states.dtype):
                raw = data.reshape(-1).view(np.uint8)
                out[at : at + len(raw)] = raw
                at += len(raw)
            sizes[number] = at
        out[: 4 * len(sizes)] = np.diff(sizes, prepend=np.uint32(4 * len(sizes))).view(np.uint8)
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
        for number, (layer, block) in enumerate((layer, block) for layer in self._layers for block in blocks):
            if block.start < len(out):
                part = layer.columns(out[block])
                layer.decode(stored[ends[number] : ends[number + 1]], block.stop - block.start, part, states.dtype)

    @cached_property
    def _layers(self) -> list[_Layer]:
        if self.statistics is None:
            raise ValueError(f"codec {self.name} has not seen the states yet")
        step, mean, group = self.statistics.step, self.statistics.means(), self.statistics.groups()
        return [_Layer(number, step[number], mean[number], group[number]) for number in range(len(step))]


class _Layer:
    """What encodes and decodes blocks of one layer; thread-safe."""

    def __init__(self, number: int, step: float, mean: np.ndarray, group: np.ndarray):
        self.number, self._hidden_size = number, len(mean)
        self._share, self._mean, self._mean_tensor = np.float32(step / len(mean)), mean, torch.from_numpy(mean)
        self._channels = [np.flatnonzero(group == number) for number in range(GROUPS) if (group == number).any()]
        self._places = torch.from_numpy(np.argsort(np.concatenate(self._channels)))

    def columns(self, rows: np.ndarray) -> np.ndarray:
        """This layer's features ``[n, H]`` of ``[n, L*H]``."""
        return rows[:, self.number * self._hidden_size : (self.number + 1) * self._hidden_size]

    def encoded(self, rows: np.ndarray, energy: np.ndarray, dtype: torch.dtype) -> list[np.ndarray]:
        """The bytes of a block of ``rows [n, H]``, part by part; adds to ``energy``: of the features, of the errors."""
        symbols, steps = _symbols(*rows.shape), np.empty(len(rows), "<u2")
        escaped, energies = [np.empty(0, "<u4")], np.zeros(2)
        for part in _parts(rows):
            # What overflows, or is not a number, is stored as it is.
            with np.errstate(over="ignore", invalid="ignore"):
                step, found = self._quantised(rows[part], symbols[part], energies, dtype)
            steps[part] = step.view("<u4") >> 16
            if len(found):
                escaped.append((found + part.start * self._hidden_size).astype("<u4"))
        places = np.concatenate(escaped)
        as_they_are = rows[places // self._hidden_size, places % self._hidden_size]
        groups = [symbols.take(channels, axis=1, mode="clip") for channels in self._channels]
        coded = [coder().coded(group) for group in (groups if len(groups) > 1 else [symbols])]
        numbers = np.array([len(places), *map(len, coded)], "<u4")
        block = [steps, numbers, *coded, places, as_they_are]
        is_smaller = sum(data.nbytes for data in block) < rows.nbytes
        energy += energies * [1, is_smaller]
        return block if is_smaller else [np.ascontiguousarray(rows)]

    def _quantised(
        self, rows: np.ndarray, out: np.ndarray, energies: np.ndarray, dtype: torch.dtype
    ) -> tuple[np.ndarray, np.ndarray]:
        """Quantise a part of a block into ``out`` (int8); adds to ``energies``.

        Returns:
            The steps, float32 ``[n]`` of bfloat16 values, and the places in ``rows`` of what is stored as it is.
        """
        features, numbers, rest = (scratch[: len(rows)] for scratch in _scratch(self._hidden_size))
        _widen(rows, dtype, features)
        np.subtract(features, self._mean, out=numbers)
        np.abs(numbers, out=rest)
        size, furthest = rest.sum(1), rest.max(1)
        step = _rounded(size * self._share)
        step[~((step >= _LEAST_STEP) & (step <= _LARGEST_STEP))] = 0
        inverse = np.divide(1, step, out=np.zeros_like(step), where=step > 0)
        np.multiply(numbers, inverse[:, None], out=rest)
        np.rint(rest, out=numbers)
        np.subtract(rest, numbers, out=rest)
        by_token = np.stack([_energy(features), _energy(rest) * np.square(step)])
        # NaN compares false.
        is_odd = ~(furthest * inverse < 127) | ((step == 0) & (size != 0))
        if dtype == torch.float16:
            is_odd |= furthest > _MOST_FLOAT16 / 2
        places = np.empty(0, np.int64)
        if is_odd.any():
            odd = np.flatnonzero(is_odd)
            is_far = ~(np.abs(numbers[odd]) <= 127) | (step[odd] == 0)[:, None]
            if dtype == torch.float16:
                is_far |= np.abs(features[odd]) > _MOST_FLOAT16
            numbers[odd] = np.where(is_far, 0, numbers[odd])
            by_token[1, odd] = _energy(np.where(is_far, 0, rest[odd])) * np.square(step[odd])
            row, channel = np.nonzero(is_far)
            places = odd[row] * self._hidden_size + channel
        energies += np.nan_to_num(by_token, copy=False, posinf=0.0, neginf=0.0).sum(1, dtype=np.float64)
        np.copyto(out, numbers, casting="unsafe")
        return step, places

    def decode(self, stored: np.ndarray, count: int, out: np.ndarray, dtype: torch.dtype) -> None:
        """Decode the first ``len(out)`` of a block's ``count`` rows into ``out [m, H]``.

        Raises:
            ValueError: it is damaged.
        """
        if len(stored) == count * self._hidden_size * out.itemsize:
            out[:] = stored.view(out.dtype).reshape(count, -1)[: len(out)]
            return
        begin = 2 * count + 4 * (1 + len(self._channels))
        if len(stored) < begin:
            raise ValueError("a block is cut off")
        # Bytes that are not aligned are copied first.
        steps = torch.from_numpy(stored[: 2 * count].copy()).view(torch.bfloat16).float()[:, None]
        num_escaped, *sizes = stored[2 * count : begin].copy().view("<u4").tolist()
        if begin + sum(sizes) + num_escaped * (4 + out.itemsize) != len(stored):
            raise ValueError("the sizes in a block do not add up")
        symbols = _symbols(count, self._hidden_size)
        first = 0
        for channels, size in zip(self._channels, sizes, strict=True):
            found = coder().decoded(stored[begin : begin + size], count * len(channels))
            np.copyto(symbols[:, first : first + len(channels)], found.view(np.int8).reshape(count, -1))
            first, begin = first + len(channels), begin + size
        decoded = torch.from_numpy(out.view(f"<i{out.itemsize}")).view(dtype)
        # For so few features torch starts no threads of its own.
        at_once = _AT_ONCE if torch.get_num_threads() == 1 else 1 << 15
        for part in _parts(out, at_once):
            wide, moved, _ = (scratch[: part.stop - part.start] for scratch in _scratch(self._hidden_size))
            np.copyto(wide, symbols[part])
            numbers = torch.from_numpy(wide)
            if len(self._channels) > 1:
                numbers = torch.index_select(numbers, 1, self._places, out=torch.from_numpy(moved))
            decoded[part] = torch.addcmul(self._mean_tensor, numbers, steps[part], out=numbers)
        if num_escaped:
            places = stored[begin : begin + 4 * num_escaped].copy().view("<u4").astype(np.int64)
            if places.max() >= count * self._hidden_size:
                raise ValueError("a block has a feature beyond its end")
            within = places < out.size
            as_they_are = stored[begin + 4 * num_escaped :].copy().view(out.dtype)
            out[places[within] // self._hidden_size, places[within] % self._hidden_size] = as_they_are[within]


def _blocks(num_tokens: int, hidden_size: int) -> Iterator[slice]:
    """The rows of each block of a layer."""
    rows = max(1, BLOCK_ELEMENTS // hidden_size)
    return (slice(start, min(start + rows, num_tokens)) for start in range(0, num_tokens, rows))


def _parts(rows: np.ndarray, at_once: int = _AT_ONCE) -> Iterator[slice]:
    """The rows of a block that are worked on at a time."""
    step = max(1, at_once // rows.shape[1])
    return (slice(start, min(start + step, len(rows))) for start in range(0, len(rows), step))


def _widen(rows: np.ndarray, dtype: torch.dtype, out: np.ndarray) -> None:
    """The elements whose bits ``rows`` are, as float32."""
    if dtype == torch.bfloat16:
        np.left_shift(rows, 16, out=out.view(np.uint32), dtype=np.uint32)
    else:
        np.copyto(out, rows.view({torch.float16: np.float16, torch.float32: np.float32}[dtype]))


def _rounded(values: np.ndarray) -> np.ndarray:
    """float32 values rounded to those that bfloat16 has."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def _energy(rows: np.ndarray) -> np.ndarray:
    """float32 ``[n]``: the sum of squares of each row."""
    return np.einsum("ij,ij->i", rows, rows)


_thread = threading.local()


def _scratch(hidden_size: int) -> list[np.ndarray]:
    """Three float32 ``[rows, H]`` of a part, not cleared, that this thread uses again: new pages cost time."""
    found: list[np.ndarray] | None = getattr(_thread, "scratch", None)
    if found is None or found[0].shape[1] != hidden_size:
        rows = max(1, _AT_ONCE // hidden_size)
        found = _thread.scratch = [np.empty((rows, hidden_size), np.float32) for _ in range(3)]
    return found


def _symbols(count: int, hidden_size: int) -> np.ndarray:
    """int8 ``[count, H]`` of a block, not cleared, that this thread uses again."""
    memory: np.ndarray | None = getattr(_thread, "symbols", None)
    if memory is None or len(memory) < count * hidden_size:
        memory = _thread.symbols = np.empty(max(count * hidden_size, BLOCK_ELEMENTS), np.int8)
    return memory[: count * hidden_size].reshape(count, hidden_size)
