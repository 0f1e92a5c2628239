"""quant: blocks of some layers -> their rows; the last step on a device, if wanted. What is stored, quant.py says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from cache_format.codecs.compiled import loops_for
from cache_format.codecs.entropy import coder
from cache_format.codecs.quant_layers import AT_ONCE, ONE_THREAD, QuantLayers, scratch
from cache_format.codecs.quant_statistics import GROUPS
from cache_format.codecs.row_runs import row_runs
from cache_format.codecs.thread_memory import thread_memory

_ON_DEVICE = 1 << 24
"""Features that are worked on at a time on a device: float32 of so many take 64 MiB."""

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


_NO_SYMBOLS = np.frombuffer(b"", np.int8).reshape(0, 0)
"""Of a group without channels."""

_NO_PLACES = np.empty(0, np.int64)

_INFINITE = np.uint16(0x7F80)
"""The exponent of what is not finite in bfloat16."""


def decode(layers: QuantLayers, blocks: Sequence[np.ndarray], count: int, out: np.ndarray, dtype: torch.dtype) -> None:
    """Decode the first ``len(out)`` rows of blocks of ``count``, one of each layer, into ``out [m, L*H]``.

    Raises:
        ValueError: they are damaged.
    """
    loops = loops_for(dtype)
    if loops is None:
        symbols, steps = (
            thread_memory("quant's symbols", out.shape, np.int8),
            np.zeros((len(out), layers.shape[0]), np.uint16),
        )
        as_they_are = unpack(layers, blocks, count, symbols, steps, out.itemsize)
        _dequantise(layers, symbols, _float32(steps), _as_tensor(out, dtype))
    else:
        as_they_are = []
        for number, found in enumerate(_unpacked(layers, blocks, count, len(out), out.itemsize)):
            if found.symbols:
                groups = [*found.symbols, *[_NO_SYMBOLS] * (GROUPS - len(found.symbols))]
                place, mean = layers.places[number], layers.mean[number]
                loops.quant_decode(*groups, place, mean, _float32(found.steps), number, out)
            as_they_are.append(found.as_they_are)
    for row, column, features in as_they_are:
        out[row, column] = features


def unpack(
    layers: QuantLayers, blocks: Sequence[np.ndarray], count: int, symbols: np.ndarray, steps: np.ndarray, itemsize: int
) -> list[AsTheyAre]:
    """Entropy-decode the first rows of blocks of ``count`` into ``symbols [m, L*H]`` (int8, sorted by group) and
    ``steps [m, L]`` (bfloat16's bits).

    Returns:
        what is to stand in the rows as it is, features being of ``itemsize`` bytes.

    Raises:
        ValueError: they are damaged.
    """
    as_they_are: list[AsTheyAre] = []
    for number, found in enumerate(_unpacked(layers, blocks, count, len(symbols), itemsize)):
        groups = layers.groups[number]
        for group, coded in zip(groups, found.symbols or [np.int8(0)] * len(groups), strict=True):
            symbols[:, group] = coded
        steps[:, number] = found.steps
        as_they_are.append(found.as_they_are)
    return as_they_are


def _unpacked(
    layers: QuantLayers, blocks: Sequence[np.ndarray], count: int, rows: int, itemsize: int
) -> Iterator[_Unpacked]:
    """The first ``rows`` of each layer's block of ``count``, entropy-decoded."""
    parts: list[tuple[int, np.ndarray, AsTheyAre]] = []
    hidden_size, coded, counts = layers.shape[1], list[np.ndarray](), list[int]()
    for number, (block, groups) in enumerate(zip(blocks, layers.groups, strict=True)):
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
    layers: QuantLayers,
    symbols: Tensor,
    steps: Tensor,
    filled: Tensor,
    places: Tensor,
    features: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """``[B, S, L*H]`` of ``symbols`` and ``steps [B, S, L]`` where they are, without waiting.

    The first ``filled [B]`` tokens of a row; zeros behind them. ``features`` go to ``places`` as they are.
    """
    (num_layers, hidden_size), device = layers.shape, symbols.device
    if device not in layers.on_devices:
        # Waited for, so that every stream may look at them.
        layers.on_devices[device] = (layers.mean_tensor.to(device), layers.unsorted.int().to(device))
    mean, unsorted = layers.on_devices[device]
    out = torch.empty(symbols.shape, dtype=dtype, device=device)
    is_padding = torch.arange(symbols.shape[1], device=device) >= filled[:, None]
    flat = [tensor.flatten(0, 1) for tensor in (symbols, steps, is_padding, out)]
    for part in row_runs(len(flat[0]), _ON_DEVICE // symbols.shape[2]):
        number, step, is_none, decoded = (tensor[part] for tensor in flat)
        if not layers.is_sorted:
            number = number.index_select(1, unsorted)
        states = torch.addcmul(mean, number.float().unflatten(1, (num_layers, hidden_size)), step.float()[..., None])
        decoded.copy_(states.masked_fill_(is_none[:, None, None], 0).flatten(1))
    if len(places):
        bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
        out.view(bits).view(-1).index_copy_(0, places, features.view(bits))
    return out


def _dequantise(layers: QuantLayers, symbols: np.ndarray, steps: np.ndarray, out: Tensor) -> None:
    num_layers, hidden_size = layers.shape
    at_once = AT_ONCE if torch.get_num_threads() == 1 else ONE_THREAD
    by_layer, all_steps = out.unflatten(1, (num_layers, hidden_size)), torch.from_numpy(steps)[..., None]
    for part in row_runs(len(out), at_once // out.shape[1]):
        wide, rest = scratch(symbols[part].shape)
        np.copyto(wide, symbols[part])
        numbers = torch.from_numpy(wide)
        if not layers.is_sorted:
            numbers = torch.index_select(numbers, 1, layers.unsorted, out=torch.from_numpy(rest))
        states = numbers.view(-1, num_layers, hidden_size)
        by_layer[part] = torch.addcmul(layers.mean_tensor, states, all_steps[part], out=states)


def _as_tensor(bits: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(bits.view(f"<i{bits.itemsize}")).view(dtype)


def _float32(bits: np.ndarray) -> np.ndarray:
    """The bfloat16 values whose bits these are."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
