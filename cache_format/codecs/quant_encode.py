"""quant: rows of some layers -> their blocks. What is stored, quant.py says.

All layers go through the vector unit together: each call has a cost of its own, and samples are short.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice, pairwise
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from cache_format.codecs.compiled import loops_for
from cache_format.codecs.entropy import coder
from cache_format.codecs.quant_layers import AT_ONCE, ONE_THREAD, QuantLayers, scratch
from cache_format.codecs.row_runs import row_runs
from cache_format.codecs.thread_memory import thread_memory

_LEAST_STEP, _LARGEST_STEP = 2.0**-100, 2.0**100
"""Steps beyond these could not be divided by, or squared: their rows are stored as they are."""

_MOST_FLOAT16 = 32768.0
"""Larger features of float16 are stored as they are: decoded, they might be rounded up to Inf."""

Block = list[np.ndarray]
"""The parts of one layer's block, in order."""


@dataclass(frozen=True, slots=True)
class _Quantised:
    """The rows of a block, ``n`` of them."""

    symbols: list[np.ndarray]
    """int8 ``[n, .]`` of each group that has channels, layer by layer"""
    steps: np.ndarray
    """bfloat16's bits ``[L, n]``"""
    places: list[np.ndarray]
    """of each layer uint32: row * H + channel of what is stored as it is, ascending"""


def encoded(layers: QuantLayers, rows: np.ndarray, energy: np.ndarray, dtype: torch.dtype) -> list[Block]:
    """Of each layer the block of ``rows [n, L*H]``; writes ``energy [n, 2, L]``: of features, of errors."""
    count, hidden_size = len(rows), layers.shape[1]
    quantised = _quantised(layers, rows, energy, dtype)
    all_coded = iter(coder().coded(quantised.symbols))
    blocks = []
    for number, groups in enumerate(layers.groups):
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


def _quantised(layers: QuantLayers, rows: np.ndarray, energy: np.ndarray, dtype: torch.dtype) -> _Quantised:
    # numpy adds up a row that is alone and has more than 8,192 features in pieces: there is no loop for that.
    loops = None if rows.size == layers.shape[1] else loops_for(dtype)
    return _in_parts(layers, rows, energy, dtype) if loops is None else _compiled(layers, loops, rows, energy)


def _compiled(layers: QuantLayers, loops: ModuleType, rows: np.ndarray, energy: np.ndarray) -> _Quantised:
    count, num_layers = len(rows), len(layers.groups)
    symbols = thread_memory("quant's symbols", (rows.size,), np.int8)
    places, counts = thread_memory("quant's places", (rows.size,), np.uint32), np.empty(num_layers, np.int64)
    steps, limits = np.empty((num_layers, count), np.uint16), (_LEAST_STEP, _LARGEST_STEP)
    loops.quant_encode(
        rows, layers.mean, layers.share, limits, layers.order, layers.ends, symbols, steps, energy, places, counts
    )
    apart = [symbols[group.start * count : group.stop * count] for group in layers.all_groups]
    at = np.cumsum([0, *counts]).tolist()
    return _Quantised(apart, steps, [places[start:stop].copy() for start, stop in pairwise(at)])


def _in_parts(layers: QuantLayers, rows: np.ndarray, energy: np.ndarray, dtype: torch.dtype) -> _Quantised:
    count, (num_layers, hidden_size) = len(rows), layers.shape
    symbols, steps = thread_memory("quant's symbols", rows.shape, np.int8), np.empty((count, num_layers), np.float32)
    found = [np.empty((3, 0), np.int64)]
    for part in row_runs(count, AT_ONCE // rows.shape[1]):
        # What overflows, or is not a number, is stored as it is.
        with np.errstate(over="ignore", invalid="ignore"):
            found.append(_in_passes(layers, rows[part], dtype, symbols[part], steps[part], energy[part]))
        found[-1][0] += part.start
    row, layer, channel = np.concatenate(found, axis=1)
    places = (row * hidden_size + channel).astype("<u4")
    return _Quantised(
        [np.ascontiguousarray(symbols[:, group]) for group in layers.all_groups],
        (steps.view("<u4").T >> 16).astype("<u2", order="C"),
        [places[layer == number] for number in range(num_layers)],
    )


def _in_passes(
    layers: QuantLayers,
    rows: np.ndarray,
    dtype: torch.dtype,
    symbols: np.ndarray,
    steps: np.ndarray,
    energy: np.ndarray,
) -> np.ndarray:
    """Quantise some rows, in passes over all of them, into ``symbols [n, L*H]`` (sorted by group) and ``steps
    [n, L]``; writes ``energy``.

    Returns:
        int64 ``[3, k]``: row, layer and channel of what is stored as it is, ascending.
    """
    num_layers, hidden_size = layers.shape
    numbers, rest = scratch(rows.shape)
    by_layer, rest_by_layer = numbers.reshape(-1, hidden_size), rest.reshape(-1, hidden_size)
    _widen(rows, dtype, numbers)
    before = _energy(by_layer)
    np.subtract(numbers, layers.mean.reshape(-1), out=numbers)
    np.abs(numbers, out=rest)
    # Integers are compared faster, and are in the order of positive floats; NaN is the largest.
    furthest = rest_by_layer.view(np.uint32).max(1).view(np.float32)
    size = np.einsum("rh->r", rest_by_layer)
    step = _rounded((size.reshape(-1, num_layers) * layers.share).reshape(-1))
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
        halves = rows.view(np.float16).reshape(-1, num_layers, hidden_size)
        is_far |= np.abs(halves[odd // num_layers, odd % num_layers]) > _MOST_FLOAT16
    at, channel = np.nonzero(is_far)
    at = odd[at]
    rest_by_layer[at, channel] = by_layer[at, channel] = 0
    for number, by_token in enumerate((before, _energy(by_layer) * np.square(step))):
        energy[:, number] = np.where(np.isfinite(by_token), by_token, 0).reshape(-1, num_layers)
    if not layers.is_sorted:
        _chosen_columns(torch.from_numpy(rest), layers.sorted, torch.from_numpy(numbers))
        rest = numbers
    np.copyto(symbols, rest, casting="unsafe")
    steps[:] = step.reshape(-1, num_layers)
    return np.stack([at // num_layers, at % num_layers, channel])


def _chosen_columns(rows: Tensor, columns: Tensor, out: Tensor) -> None:
    at_once = AT_ONCE if torch.get_num_threads() == 1 else ONE_THREAD
    for part in row_runs(len(rows), at_once // rows.shape[1]):
        torch.index_select(rows[part], 1, columns, out=out[part])


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
