"""The inner loops of quant: rows of some layers <-> their blocks. What is stored, quant.py says.

All layers go through the vector unit together: each call has a cost of its own, and samples are short.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from cache_format.codecs.compiled import loops_for
from cache_format.codecs.entropy import coder
from cache_format.codecs.quant_statistics import GROUPS, Statistics
from cache_format.codecs.row_runs import row_runs
from cache_format.codecs.thread_memory import thread_memory

_AT_ONCE = 1 << 18
"""Features that are worked on at a time. Measured: with half as many the calls cost more than a larger cache saves."""

_ON_DEVICE = 1 << 24
"""The same on a device: float32 of so many take 64 MiB."""

_ONE_THREAD = 1 << 15
"""For so few features torch starts no threads."""

_LEAST_STEP, _LARGEST_STEP = 2.0**-100, 2.0**100
"""Steps beyond these could not be divided by, or squared: their rows are stored as they are."""

_MOST_FLOAT16 = 32768.0
"""Larger features of float16 are stored as they are: decoded, they might be rounded up to Inf."""

Block = list[np.ndarray]
"""The parts of one layer's block, in order."""

AsTheyAre = tuple[np.ndarray | slice, np.ndarray | slice, np.ndarray]
"""Rows, columns, and the bits of the features there ``[k]``; slices where they are a whole layer's, ``[m, H]``."""


@dataclass(frozen=True, slots=True)
class _Unpacked:
    """The first ``m`` rows of a layer's block."""

    steps: np.ndarray
    """bfloat16's bits ``[m]``"""
    symbols: list[np.ndarray]
    """int8 ``[m, .]`` of each group that has channels; none where the block is stored as it is"""
    as_they_are: AsTheyAre


@dataclass(frozen=True, slots=True)
class _Quantised:
    """The rows of a block, ``n`` of them."""

    symbols: list[np.ndarray]
    """int8 ``[n, .]`` of each group that has channels, layer by layer"""
    steps: np.ndarray
    """bfloat16's bits ``[L, n]``"""
    places: list[np.ndarray]
    """of each layer uint32: row * H + channel of what is stored as it is, ascending"""


_NO_SYMBOLS = np.frombuffer(b"", np.int8).reshape(0, 0)
"""Of a group without channels."""

_NO_PLACES = np.empty(0, np.int64)

_INFINITE = np.uint16(0x7F80)
"""The exponent of what is not finite in bfloat16."""


class QuantLayers:
    """Encodes and decodes blocks of some layers; thread-safe."""

    def __init__(self, statistics: Statistics, chosen: Sequence[int]):
        """``chosen``: which of the statistics' layers, in the order in which rows have them."""
        at = list(chosen)
        self.chosen, self._mean = at, statistics.means()[at]
        self._hidden_size = self._mean.shape[1]
        self._share = (np.array(statistics.step, np.float32) / np.float32(self._hidden_size))[at]
        self._mean_tensor = torch.from_numpy(self._mean)
        self._groups: list[list[slice]] = []
        """of each layer: where its groups stand once a row's features are sorted by layer and group"""
        order = []
        for number, group in enumerate(statistics.groups()[at]):
            first = number * self._hidden_size
            order.append(first + np.argsort(group, kind="stable"))
            ends = (first + np.cumsum(np.bincount(group, minlength=GROUPS))).tolist()
            self._groups.append([slice(low, high) for low, high in pairwise([first, *ends]) if low < high])
        places = np.concatenate(order)
        self._sorted, self._unsorted = torch.from_numpy(places), torch.from_numpy(np.argsort(places))
        self._is_sorted = bool((np.diff(places) > 0).all())
        self._all_groups = [group for of_layer in self._groups for group in of_layer]
        self._ends = np.array([group.stop for group in self._all_groups])
        self._order, self._places = (
            (tensor.numpy() % self._hidden_size).reshape(-1, self._hidden_size).astype(np.uint32)
            for tensor in (self._sorted, self._unsorted)
        )
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @property
    def shape(self) -> tuple[int, int]:
        """Layers, and channels of each."""
        layers, hidden_size = self._mean.shape
        return layers, hidden_size

    # -- encode -------------------------------------------------------------------------------------------------------

    def encoded(self, rows: np.ndarray, energy: np.ndarray, dtype: torch.dtype) -> list[Block]:
        """Of each layer the block of ``rows [n, L*H]``; writes ``energy [n, 2, L]``: of features, of errors."""
        count, hidden_size = len(rows), self.shape[1]
        quantised = self._quantised(rows, energy, dtype)
        all_coded = iter(coder().coded(quantised.symbols))
        blocks = []
        for number, groups in enumerate(self._groups):
            coded, places = list(islice(all_coded, len(groups))), quantised.places[number]
            row, channel = np.divmod(places, hidden_size)
            as_they_are = rows[row, number * hidden_size + channel]
            numbers = np.array([len(places), *map(len, coded)], "<u4")
            block = [quantised.steps[number], numbers, *coded, places, as_they_are]
            if sum(data.nbytes for data in block) >= count * hidden_size * rows.itemsize:
                block = [np.ascontiguousarray(rows[:, number * hidden_size : (number + 1) * hidden_size])]
                energy[:, 1, number] = 0
            blocks.append(block)
        return blocks

    def _quantised(self, rows: np.ndarray, energy: np.ndarray, dtype: torch.dtype) -> _Quantised:
        # numpy adds up a row that is alone and has more than 8,192 features in pieces: there is no loop for that.
        loops = None if rows.size == self.shape[1] else loops_for(dtype)
        return self._in_parts(rows, energy, dtype) if loops is None else self._compiled(loops, rows, energy)

    def _compiled(self, loops: ModuleType, rows: np.ndarray, energy: np.ndarray) -> _Quantised:
        count, layers = len(rows), len(self._groups)
        symbols = thread_memory("quant's symbols", (rows.size,), np.int8)
        places, counts = thread_memory("quant's places", (rows.size,), np.uint32), np.empty(layers, np.int64)
        steps, limits = np.empty((layers, count), np.uint16), (_LEAST_STEP, _LARGEST_STEP)
        loops.quant_encode(
            rows, self._mean, self._share, limits, self._order, self._ends, symbols, steps, energy, places, counts
        )
        apart = [symbols[group.start * count : group.stop * count] for group in self._all_groups]
        at = np.cumsum([0, *counts]).tolist()
        return _Quantised(apart, steps, [places[start:stop].copy() for start, stop in pairwise(at)])

    def _in_parts(self, rows: np.ndarray, energy: np.ndarray, dtype: torch.dtype) -> _Quantised:
        count, (layers, hidden_size) = len(rows), self.shape
        symbols, steps = thread_memory("quant's symbols", rows.shape, np.int8), np.empty((count, layers), np.float32)
        found = [np.empty((3, 0), np.int64)]
        for part in row_runs(count, _AT_ONCE // rows.shape[1]):
            # What overflows, or is not a number, is stored as it is.
            with np.errstate(over="ignore", invalid="ignore"):
                found.append(self._in_passes(rows[part], dtype, symbols[part], steps[part], energy[part]))
            found[-1][0] += part.start
        row, layer, channel = np.concatenate(found, axis=1)
        places = (row * hidden_size + channel).astype("<u4")
        return _Quantised(
            [np.ascontiguousarray(symbols[:, group]) for group in self._all_groups],
            (steps.view("<u4").T >> 16).astype("<u2", order="C"),
            [places[layer == number] for number in range(layers)],
        )

    def _in_passes(
        self, rows: np.ndarray, dtype: torch.dtype, symbols: np.ndarray, steps: np.ndarray, energy: np.ndarray
    ) -> np.ndarray:
        """Quantise some rows, in passes over all of them, into ``symbols [n, L*H]`` (sorted by group) and ``steps
        [n, L]``; writes ``energy``.

        Returns:
            int64 ``[3, k]``: row, layer and channel of what is stored as it is, ascending.
        """
        layers, hidden_size = self.shape
        numbers, rest = _scratch(rows.shape)
        by_layer, rest_by_layer = numbers.reshape(-1, hidden_size), rest.reshape(-1, hidden_size)
        _widen(rows, dtype, numbers)
        before = _energy(by_layer)
        np.subtract(numbers, self._mean.reshape(-1), out=numbers)
        np.abs(numbers, out=rest)
        # Integers are compared faster, and are in the order of positive floats; NaN is the largest.
        furthest = rest_by_layer.view(np.uint32).max(1).view(np.float32)
        size = np.einsum("rh->r", rest_by_layer)
        step = _rounded((size.reshape(-1, layers) * self._share).reshape(-1))
        step[~((step >= _LEAST_STEP) & (step <= _LARGEST_STEP))] = 0
        inverse = np.divide(1, step, out=np.zeros_like(step), where=step > 0)
        np.multiply(by_layer, inverse[:, None], out=by_layer)
        np.rint(numbers, out=rest)
        np.subtract(numbers, rest, out=numbers)
        # NaN compares false.
        is_odd = ~(furthest * inverse < 127) | ((step == 0) & (size != 0))
        if dtype == torch.float16:
            is_odd |= furthest > _MOST_FLOAT16 / 2
        odd = np.flatnonzero(is_odd)
        is_far = ~(np.abs(rest_by_layer[odd]) <= 127) | (step[odd] == 0)[:, None]
        if dtype == torch.float16:
            halves = rows.view(np.float16).reshape(-1, layers, hidden_size)
            is_far |= np.abs(halves[odd // layers, odd % layers]) > _MOST_FLOAT16
        at, channel = np.nonzero(is_far)
        at = odd[at]
        rest_by_layer[at, channel] = by_layer[at, channel] = 0
        for number, by_token in enumerate((before, _energy(by_layer) * np.square(step))):
            energy[:, number] = np.where(np.isfinite(by_token), by_token, 0).reshape(-1, layers)
        if not self._is_sorted:
            _chosen_columns(torch.from_numpy(rest), self._sorted, torch.from_numpy(numbers))
            rest = numbers
        np.copyto(symbols, rest, casting="unsafe")
        steps[:] = step.reshape(-1, layers)
        return np.stack([at // layers, at % layers, channel])

    # -- decode -------------------------------------------------------------------------------------------------------

    def decode(self, blocks: Sequence[np.ndarray], count: int, out: np.ndarray, dtype: torch.dtype) -> None:
        """Decode the first ``len(out)`` rows of blocks of ``count``, one of each layer, into ``out [m, L*H]``.

        Raises:
            ValueError: they are damaged.
        """
        loops = loops_for(dtype)
        if loops is None:
            symbols, steps = (
                thread_memory("quant's symbols", out.shape, np.int8),
                np.zeros((len(out), self.shape[0]), np.uint16),
            )
            as_they_are = self.unpack(blocks, count, symbols, steps, out.itemsize)
            self._dequantise(symbols, _float32(steps), _as_tensor(out, dtype))
        else:
            as_they_are = []
            for number, found in enumerate(self._unpacked(blocks, count, len(out), out.itemsize)):
                if found.symbols:
                    groups = [*found.symbols, *[_NO_SYMBOLS] * (GROUPS - len(found.symbols))]
                    place, mean = self._places[number], self._mean[number]
                    loops.quant_decode(*groups, place, mean, _float32(found.steps), number, out)
                as_they_are.append(found.as_they_are)
        for row, column, features in as_they_are:
            out[row, column] = features

    def unpack(
        self, blocks: Sequence[np.ndarray], count: int, symbols: np.ndarray, steps: np.ndarray, itemsize: int
    ) -> list[AsTheyAre]:
        """Entropy-decode the first rows of blocks of ``count`` into ``symbols [m, L*H]`` (int8, sorted by group) and
        ``steps [m, L]`` (bfloat16's bits).

        Returns:
            what is to stand in the rows as it is, features being of ``itemsize`` bytes.

        Raises:
            ValueError: they are damaged.
        """
        as_they_are: list[AsTheyAre] = []
        for number, found in enumerate(self._unpacked(blocks, count, len(symbols), itemsize)):
            groups = self._groups[number]
            for group, coded in zip(groups, found.symbols or [np.int8(0)] * len(groups), strict=True):
                symbols[:, group] = coded
            steps[:, number] = found.steps
            as_they_are.append(found.as_they_are)
        return as_they_are

    def _unpacked(self, blocks: Sequence[np.ndarray], count: int, rows: int, itemsize: int) -> Iterator[_Unpacked]:
        """The first ``rows`` of each layer's block of ``count``, entropy-decoded."""
        parts: list[tuple[int, np.ndarray, AsTheyAre]] = []
        hidden_size, coded, counts = self.shape[1], list[np.ndarray](), list[int]()
        for number, (block, groups) in enumerate(zip(blocks, self._groups, strict=True)):
            first = number * hidden_size
            if len(block) == count * hidden_size * itemsize:
                features = block.view(f"<u{itemsize}").reshape(count, -1)[:rows]
                parts.append((0, np.zeros(rows, np.uint16), (slice(None), slice(first, first + hidden_size), features)))
                continue
            begin = 2 * count + 4 * (1 + len(groups))
            if len(block) < begin:
                raise ValueError("a block is cut off")
            # Bytes that are not aligned are copied first.
            steps = block[: 2 * rows].copy().view("<u2")
            if ((steps & _INFINITE) == _INFINITE).any():
                raise ValueError("a step in a block is not finite")
            num_escaped, *sizes = block[2 * count : begin].copy().view("<u4").tolist()
            if begin + sum(sizes) + num_escaped * (4 + itemsize) != len(block):
                raise ValueError("the sizes in a block do not add up")
            for group, size in zip(groups, sizes, strict=True):
                coded.append(block[begin : begin + size])
                counts.append(count * (group.stop - group.start))
                begin += size
            if not num_escaped:
                parts.append((len(groups), steps, (_NO_PLACES, _NO_PLACES, np.empty(0, f"<u{itemsize}"))))
                continue
            places = block[begin : begin + 4 * num_escaped].copy().view("<u4").astype(np.int64)
            if places.max() >= count * hidden_size:
                raise ValueError("a block has a feature beyond its end")
            features = block[begin + 4 * num_escaped :].copy().view(f"<u{itemsize}")
            if rows < count:
                within = places < rows * hidden_size
                places, features = places[within], features[within]
            row, channel = np.divmod(places, hidden_size)
            parts.append((len(groups), steps, (row, first + channel, features)))
        symbols = iter(coder().decoded(coded, counts))
        for num_groups, steps, as_they_are in parts:
            found = [part.view(np.int8).reshape(count, -1)[:rows] for part in islice(symbols, num_groups)]
            yield _Unpacked(steps, found, as_they_are)

    def decode_on_device(
        self, symbols: Tensor, steps: Tensor, filled: Tensor, places: Tensor, features: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """``[B, S, L*H]`` of ``symbols`` and ``steps [B, S, L]`` where they are, without waiting.

        The first ``filled [B]`` tokens of a row; zeros behind them. ``features`` go to ``places`` as they are.
        """
        (layers, hidden_size), device = self.shape, symbols.device
        if device not in self._tables:
            # Waited for, so that every stream may look at them.
            self._tables[device] = (self._mean_tensor.to(device), self._unsorted.int().to(device))
        mean, unsorted = self._tables[device]
        out = torch.empty(symbols.shape, dtype=dtype, device=device)
        is_padding = torch.arange(symbols.shape[1], device=device) >= filled[:, None]
        flat = [tensor.flatten(0, 1) for tensor in (symbols, steps, is_padding, out)]
        for part in row_runs(len(flat[0]), _ON_DEVICE // symbols.shape[2]):
            number, step, is_none, decoded = (tensor[part] for tensor in flat)
            if not self._is_sorted:
                number = number.index_select(1, unsorted)
            states = torch.addcmul(mean, number.float().unflatten(1, (layers, hidden_size)), step.float()[..., None])
            decoded.copy_(states.masked_fill_(is_none[:, None, None], 0).flatten(1))
        if len(places):
            bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
            out.view(bits).view(-1).index_copy_(0, places, features.view(bits))
        return out

    def _dequantise(self, symbols: np.ndarray, steps: np.ndarray, out: Tensor) -> None:
        layers, hidden_size = self.shape
        at_once = _AT_ONCE if torch.get_num_threads() == 1 else _ONE_THREAD
        by_layer, all_steps = out.unflatten(1, (layers, hidden_size)), torch.from_numpy(steps)[..., None]
        for part in row_runs(len(out), at_once // out.shape[1]):
            wide, rest = _scratch(symbols[part].shape)
            np.copyto(wide, symbols[part])
            numbers = torch.from_numpy(wide)
            if not self._is_sorted:
                numbers = torch.index_select(numbers, 1, self._unsorted, out=torch.from_numpy(rest))
            states = numbers.view(-1, layers, hidden_size)
            by_layer[part] = torch.addcmul(self._mean_tensor, states, all_steps[part], out=states)


def _chosen_columns(rows: Tensor, columns: Tensor, out: Tensor) -> None:
    at_once = _AT_ONCE if torch.get_num_threads() == 1 else _ONE_THREAD
    for part in row_runs(len(rows), at_once // rows.shape[1]):
        torch.index_select(rows[part], 1, columns, out=out[part])


def _as_tensor(bits: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(bits.view(f"<i{bits.itemsize}")).view(dtype)


def _float32(bits: np.ndarray) -> np.ndarray:
    """The bfloat16 values whose bits these are."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


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
    return np.einsum("rh,rh->r", rows, rows)


def _scratch(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Two float32 arrays, of :func:`thread_memory`."""
    return thread_memory("quant's numbers", shape, np.float32), thread_memory("quant's rest", shape, np.float32)
