"""Inner loops of the codecs for bfloat16 states, for numba: imported by compiled.py alone.

bfloat16 is handled as its bits, uint16; L layers of H features are a row. Short loops over one layer of one row, one
after the other, on memory that was allocated apart, are what LLVM makes vector code of.
"""

from __future__ import annotations

import numba
import numpy as np
from numba.core.compiler_lock import global_compiler_lock as compiler_lock

__all__ = ["compiler_lock"]

is_compiling = not numba.config.DISABLE_JIT  # type: ignore[attr-defined]
"""NUMBA_DISABLE_JIT=1 leaves the loops to Python."""

_TINY = np.finfo(np.float32).tiny

# Not kept for other processes: numba does that in pickles, without a checksum.
_compiled = numba.njit(nogil=True, error_model="numpy")


@_compiled
def _bfloat16(bits):  # type: ignore[no-untyped-def]
    """The bits of a float32, rounded to nearest, ties to even; not for NaN."""
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@_compiled
def _halved(terms, count):  # type: ignore[no-untyped-def]
    """Sum of ``terms[:count]``, in its memory: in the order of fp8's ``_sums``."""
    while count > 1:
        half = count // 2
        for i in range(half):
            terms[i] += terms[half + i]
        if count % 2:
            terms[half] = terms[count - 1]
        count -= half
    return terms[0]


@_compiled
def fp8_encode(rows, hidden_size, values, scales, sums):  # type: ignore[no-untyped-def]
    """uint16 ``rows [n, L*H]`` -> uint8 ``values``, float32 ``scales [n, L]``, ``sums [2, n, L]``; see fp8's
    ``_on_device``.

    Returns:
        whether all were finite; if not, nothing that was written is of use.
    """
    scaled, rounded = np.empty(hidden_size, np.float32), np.empty(hidden_size, np.float32)
    power = np.empty(hidden_size, np.float32)
    scaled_bits, rounded_bits, power_bits = scaled.view(np.uint32), rounded.view(np.uint32), power.view(np.uint32)
    least = np.uint32((127 - 14) << 23)
    for number in range(len(rows)):
        for layer in range(scales.shape[1]):
            row = rows[number, layer * hidden_size : (layer + 1) * hidden_size]
            value = values[number, layer * hidden_size : (layer + 1) * hidden_size]
            largest = np.uint16(0)
            for i in range(hidden_size):
                largest = max(largest, row[i] & np.uint16(0x7FFF))
            if largest >= 0x7F80:
                return False
            scaled_bits[0] = np.uint32(largest) << np.uint32(16)
            scale = scaled[0] / np.float32(448)
            if scale < _TINY:
                scale = np.float32(1)
            scales[number, layer] = scale
            divisor = scale * np.float32(256)
            for i in range(hidden_size):
                scaled_bits[i] = np.uint32(row[i] & np.uint16(0x7FFF)) << np.uint32(16)
            for i in range(hidden_size):
                scaled[i] /= divisor
            for i in range(hidden_size):
                power_bits[i] = max(scaled_bits[i] & np.uint32(0x7F800000), least) + np.uint32(20 << 23)
            for i in range(hidden_size):
                rounded[i] = (scaled[i] + power[i]) - power[i]
            for i in range(hidden_size):
                # Steps below the least power are equal: their number is the value. Above, exponents are biased anew.
                subnormal = np.uint32(np.int32(rounded[i] * np.float32(1 << 17)))
                normal = (rounded_bits[i] >> np.uint32(20)) - np.uint32((127 - 15) << 3)
                magnitude = subnormal if rounded_bits[i] < least else normal
                value[i] = np.uint8(magnitude | (np.uint32(row[i] >> np.uint16(8)) & np.uint32(0x80)))
            for i in range(hidden_size):
                error = rounded[i] - scaled[i]
                rounded[i] = error * error
                scaled[i] *= scaled[i]
            sums[0, number, layer] = _halved(scaled, hidden_size)
            sums[1, number, layer] = _halved(rounded, hidden_size)
    return True


@_compiled
def fp8_decode(values, scales, hidden_size, out):  # type: ignore[no-untyped-def]
    """uint8 ``values [n, L*H]`` and float32 ``scales [n, L]`` -> uint16 ``out [n, L*H]``."""
    number = np.empty(hidden_size, np.float32)
    bits = number.view(np.uint32)
    for row in range(len(values)):
        for layer in range(scales.shape[1]):
            value = values[row, layer * hidden_size : (layer + 1) * hidden_size]
            decoded = out[row, layer * hidden_size : (layer + 1) * hidden_size]
            scale = scales[row, layer]
            for i in range(hidden_size):
                bits[i] = (np.uint32(value[i] & np.uint8(0x7F)) << np.uint32(20)) + np.uint32(120 << 23)
            for i in range(hidden_size):
                magnitude = value[i] & np.uint8(0x7F)
                subnormal = np.float32(magnitude) * np.float32(2.0**-9)
                number[i] = (subnormal if magnitude < 8 else number[i]) * scale
            for i in range(hidden_size):
                decoded[i] = _bfloat16(bits[i]) ^ (np.uint16(value[i] & np.uint8(0x80)) << np.uint16(8))


@_compiled
def zbits_exponents(rows, usual, exponents):  # type: ignore[no-untyped-def]
    """uint16 ``rows [n, W]`` -> uint8 ``exponents``, less those that are ``usual [W]``."""
    for number in range(len(rows)):
        row, exponent = rows[number], exponents[number]
        for i in range(len(usual)):
            exponent[i] = np.uint8(row[i] >> np.uint16(7)) - usual[i]


@_compiled
def zbits_rest(rows, block_rows, starts, out):  # type: ignore[no-untyped-def]
    """uint16 ``rows [n, W]`` -> signs and mantissas of each block of rows, into uint8 ``out`` where it ``starts``."""
    width = rows.shape[1]
    for block in range(len(starts)):
        first = block * block_rows
        for number in range(first, min(first + block_rows, len(rows))):
            at = starts[block] + (number - first) * width
            row, rest = rows[number], out[at : at + width]
            for i in range(width):
                rest[i] = np.uint8((row[i] & np.uint16(0x7F)) | ((row[i] >> np.uint16(8)) & np.uint16(0x80)))


@_compiled
def zbits_join(exponents, usual, rest, out):  # type: ignore[no-untyped-def]
    """The first rows of what the two above took apart, into ``out [m, W]``."""
    for row in range(len(out)):
        for i in range(len(usual)):
            exponent = np.uint16(np.uint8(exponents[row, i] + usual[i])) << np.uint16(7)
            bits = np.uint16(rest[row, i])
            out[row, i] = exponent | (bits & np.uint16(0x7F)) | ((bits & np.uint16(0x80)) << np.uint16(8))


@_compiled
def sum_as_numpy(x):  # type: ignore[no-untyped-def]
    """float32 ``x [n]`` added up as numpy's ``einsum("i->")`` does it: in four lanes, sixteen at a time."""
    a = b = c = d = np.float32(0)
    for start in range(0, len(x) - 15, 16):
        p = x[start : start + 16]
        a += (p[0] + p[4]) + (p[8] + p[12])
        b += (p[1] + p[5]) + (p[9] + p[13])
        c += (p[2] + p[6]) + (p[10] + p[14])
        d += (p[3] + p[7]) + (p[11] + p[15])
    lanes = np.array([a, b, c, d])
    for i in range(len(x) // 16 * 16, len(x)):
        lanes[i % 4] += x[i]
    return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3])


@_compiled
def squares_as_numpy(x):  # type: ignore[no-untyped-def]
    """The squares of float32 ``x [n]`` added up as numpy's ``einsum("i,i->")`` does it."""
    a = b = c = d = np.float32(0)
    for start in range(0, len(x) - 15, 16):
        p = x[start : start + 16]
        a = p[0] * p[0] + (p[4] * p[4] + (p[8] * p[8] + (p[12] * p[12] + a)))
        b = p[1] * p[1] + (p[5] * p[5] + (p[9] * p[9] + (p[13] * p[13] + b)))
        c = p[2] * p[2] + (p[6] * p[6] + (p[10] * p[10] + (p[14] * p[14] + c)))
        d = p[3] * p[3] + (p[7] * p[7] + (p[11] * p[11] + (p[15] * p[15] + d)))
    lanes = np.array([a, b, c, d])
    for i in range(len(x) // 16 * 16, len(x)):
        lanes[i % 4] += x[i] * x[i]
    return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3])


@_compiled
def quant_encode(rows, mean, share, limits, order, ends, symbols, steps, energy, places, counts):  # type: ignore[no-untyped-def]
    """Quantise the rows of a block, layer by layer.

    Args:
        rows: uint16 ``[n, L*H]``
        mean: float32 ``[L, H]``
        share: float32 ``[L]``: of the sum of |feature - mean|, the step.
        limits: float32: the least and the largest step; rows with others are stored as they are.
        order: uint32 ``[L, H]``: of each symbol the feature of the layer.
        ends: int64 ``[.]``: where groups of symbols end among the ``L * H`` of a row.
        symbols: int8 ``[n * L*H]``, written: ``[n, .]`` of one group after another.
        steps: uint16 ``[L, n]``, written: bfloat16's bits.
        energy: float64 ``[n, 2, L]``, written: of features, of errors.
        places: uint32 ``[n * L*H]``, the first of which are written: row * H + feature of what is stored as it is,
            layer by layer.
        counts: int64 ``[L]``, written: how many of these each layer has.
    """
    layers, hidden_size = mean.shape
    wide, apart = np.empty(hidden_size, np.float32), np.empty(hidden_size, np.float32)
    rounded = np.empty(hidden_size, np.float32)
    wide_bits, apart_bits = wide.view(np.uint32), apart.view(np.uint32)
    one = np.empty(1, np.float32)
    one_bits = one.view(np.uint32)
    whole = np.empty(hidden_size, np.int8)
    found, group = 0, 0
    for layer in range(layers):
        before, first_group, middle = found, group, mean[layer]
        for number in range(len(rows)):
            row = rows[number, layer * hidden_size : (layer + 1) * hidden_size]
            for i in range(hidden_size):
                wide_bits[i] = np.uint32(row[i]) << np.uint32(16)
            for i in range(hidden_size):
                apart[i] = abs(wide[i] - middle[i])
            # The bits are in the order of the values; NaN is the largest.
            one_bits[0] = 0
            for i in range(hidden_size):
                one_bits[0] = max(one_bits[0], apart_bits[i])
            furthest = one[0]
            size = sum_as_numpy(apart)
            one[0] = size * share[layer]
            steps[layer, number] = _bfloat16(one_bits[0])
            one_bits[0] = np.uint32(steps[layer, number]) << np.uint32(16)
            step = one[0]
            if not (limits[0] <= step <= limits[1]):
                step = np.float32(0)
                steps[layer, number] = 0
            inverse = np.float32(1) / step if step > 0 else np.float32(0)
            for i in range(hidden_size):
                in_steps = (wide[i] - middle[i]) * inverse
                rounded[i] = np.rint(in_steps)
                apart[i] = in_steps - rounded[i]
            if not furthest * inverse < 127 or (step == 0 and size != 0):
                for i in range(hidden_size):
                    if not abs(rounded[i]) <= 127 or step == 0:
                        rounded[i] = apart[i] = 0
                        places[found] = number * hidden_size + i
                        found += 1
            of_features, of_errors = squares_as_numpy(wide), squares_as_numpy(apart) * (step * step)
            energy[number, 0, layer] = of_features if np.isfinite(of_features) else 0
            energy[number, 1, layer] = of_errors if np.isfinite(of_errors) else 0
            for i in range(hidden_size):
                whole[i] = np.int8(rounded[i])
            group, begin = first_group, 0
            while begin < hidden_size:
                width = ends[group] - layer * hidden_size - begin
                at = (layer * hidden_size + begin) * len(rows) + number * width
                target, feature = symbols[at : at + width], order[layer, begin : begin + width]
                for i in range(width):
                    target[i] = whole[feature[i]]
                group, begin = group + 1, begin + width
        counts[layer] = found - before


@_compiled
def quant_decode(low, middle, high, place, mean, steps, layer, out):  # type: ignore[no-untyped-def]
    """The inverse, of one layer and its first ``m`` rows.

    Args:
        low, middle, high: int8 ``[m, .]``, the symbols of each group.
        place: uint32 ``[H]``, of each feature where its symbol stands in a row of all groups.
        mean: float32 ``[H]``
        steps: float32 ``[m]``
        layer: which of the L in ``out``.
        out: uint16 ``[m, L*H]``, whose columns of the layer are written.
    """
    hidden_size, last = len(mean), len(out) - 1
    packed, sorted_back = np.empty(hidden_size, np.uint32), np.empty(hidden_size, np.uint32)
    number = np.empty(hidden_size, np.float32)
    bits = number.view(np.uint32)
    # Four rows at a time, side by side in 32 bits: one look-up puts four symbols in their places.
    for first in range(0, len(out), 4):
        begin = 0
        for group in (low, middle, high):
            width = group.shape[1]
            if width:
                a, b = group[first], group[min(first + 1, last)]
                c, d = group[min(first + 2, last)], group[min(first + 3, last)]
                there = packed[begin : begin + width]
                for i in range(width):
                    lower = np.uint32(np.uint8(a[i])) | (np.uint32(np.uint8(b[i])) << np.uint32(8))
                    upper = np.uint32(np.uint8(c[i])) | (np.uint32(np.uint8(d[i])) << np.uint32(8))
                    there[i] = lower | (upper << np.uint32(16))
            begin += width
        for i in range(hidden_size):
            sorted_back[i] = packed[place[i]]
        for row in range(first, min(first + 4, len(out))):
            step, decoded = steps[row], out[row, layer * hidden_size : (layer + 1) * hidden_size]
            above = np.uint32(24 - 8 * (row - first))
            for i in range(hidden_size):
                number[i] = mean[i] + np.float32(np.int32(sorted_back[i] << above) >> np.int32(24)) * step
            for i in range(hidden_size):
                decoded[i] = _bfloat16(bits[i])
