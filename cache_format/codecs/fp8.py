"""fp8: float8_e4m3fn with a float32 scale for each token and layer. Half the bytes of bfloat16, on disk and on the bus.

A layer of a token is divided by ``scale = absmax / 448`` and rounded to the nearest e4m3 value, so that its largest
feature is the largest of e4m3. Error of a feature x: at most ``max(|x| / 16, scale / 1024)``, half a step of the 3
mantissa bits or of the smallest (subnormal) step, and then the rounding to the stored dtype.

Scales are float32: measured on states with outlier channels, bfloat16 scales change the SNR by less than 0.15 dB either
way and save 2 of the H + 4 bytes a layer, and a float32 scale can't overflow whatever the stored dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cache_format.codecs.compiled import loops_for
from cache_format.codecs.interface import ENERGY, HeadTensor, RowCodec, States, TokenTensor

SCALES = "hidden_states_scales"
LARGEST = 448.0
"""of float8_e4m3fn (https://arxiv.org/abs/2209.05433)"""

_HOST_ELEMENTS, _DEVICE_ELEMENTS = 1 << 18, 1 << 24
"""Worked on at a time: on the host their float32 values stay in a core's cache, on a device they take 64 MiB."""


@dataclass(frozen=True)
class Fp8Codec(RowCodec):
    """Stores ``hidden_states`` F8_E4M3 ``[T, L*H]`` and ``hidden_states_scales`` F32 ``[T, L]``."""

    name = "fp8"
    lossless = False
    by_layer = True
    expected_ratio = 0.502
    relative_error = 1 / 16

    def tensors(self, states: States) -> tuple[TokenTensor, ...]:
        """Values and scales."""
        return (TokenTensor("hidden_states", "F8_E4M3", states.width), TokenTensor(SCALES, "F32", states.layers))

    def head(self, states: States, num_samples: int) -> tuple[HeadTensor, ...]:
        """``hidden_states_energy``, from which the SNR is worked out."""
        return (HeadTensor(ENERGY, "F64", (2, states.layers)),)

    def encode(self, rows: Tensor, stored: Mapping[str, Tensor], states: States) -> Tensor:
        """Values, scales and energies of ``rows``, worked out where they are; the same bits on every device.

        Tokens that are not finite have energy 0.
        """
        on_host = rows.device.type == "cpu"
        at_once = max(1, (_HOST_ELEMENTS if on_host else _DEVICE_ELEMENTS) // states.width)
        encode = _on_host(min(at_once, len(rows)), rows.dtype, states) if on_host else _on_device
        sums = torch.empty(2, len(rows), states.layers, device=rows.device)
        all_scales = torch.empty(len(rows), states.layers, device=rows.device)
        for start in range(0, len(rows), at_once):
            part = slice(start, min(start + at_once, len(rows)))
            layers = rows[part].view(-1, states.layers, states.hidden_size)
            all_scales[part], sums[:, part] = encode(layers, stored["hidden_states"][part].view(layers.shape))
        stored[SCALES].copy_(all_scales, non_blocking=True)
        energy = sums.double() * (all_scales.double() * _HALF).square_()
        return energy.nan_to_num_(0.0, 0.0, 0.0).transpose(0, 1)

    def decode(self, stored: Mapping[str, Tensor], states: States) -> Tensor:
        """Value times scale, rounded once to the stored dtype; the same bits on every device."""
        values = stored["hidden_states"].unflatten(-1, (states.layers, states.hidden_size))
        scales, out = stored[SCALES][..., None], torch.empty(values.shape, dtype=states.dtype, device=values.device)
        flat = [tensor.flatten(0, -3) for tensor in (values, scales, out)]
        at_once = max(1, _DEVICE_ELEMENTS // states.width)
        for start in range(0, len(flat[0]), at_once):
            value, scale, decoded = (tensor[start : start + at_once] for tensor in flat)
            decoded.copy_(value.float().mul_(scale))
        return out.flatten(-2)

    def decode_into(self, stored: Mapping[str, Tensor], out: Tensor, states: States) -> None:
        """The same bits as :meth:`decode`, ten times as fast on a CPU.

        Where it is not compiled: an e4m3 value's bits, its sign moved to the top, are those of a float16 of 1/256 of
        the value (exponent biases 7 and 15; subnormals too), and processors convert float16 at full speed.
        """
        loops = loops_for(out.dtype)
        if loops is not None and bool(stored[SCALES].isfinite().all()):
            # Of just these shapes: a loop does not look.
            values = stored["hidden_states"].view(torch.uint8).view(len(out), states.width)
            by_layer, decoded = stored[SCALES].view(len(out), states.layers), out.view(len(out), states.width)
            decoded_bits = decoded.view(torch.uint16).numpy()
            loops.fp8_decode(values.numpy(), by_layer.numpy(), states.hidden_size, decoded_bits)
            return
        shape = (len(out), states.layers, states.hidden_size)
        bits = stored["hidden_states"].view(torch.int8).view(shape).numpy()
        scales, out = stored[SCALES][..., None] * 256.0, out.view(shape)
        at_once = max(1, _HOST_ELEMENTS // states.width)
        halves = np.empty((min(at_once, len(out)), *shape[1:]), np.int16)
        floats = torch.empty(halves.shape, dtype=torch.float32)
        for start in range(0, len(out), at_once):
            rows = slice(start, min(start + at_once, len(out)))
            half, part = halves[: rows.stop - start], floats[: rows.stop - start]
            np.copyto(half, bits[rows])
            np.left_shift(half, 7, out=half)
            np.bitwise_and(half, np.int16(-0x8000 | 0x3F80), out=half)
            part.copy_(torch.from_numpy(half).view(torch.float16))
            part.mul_(scales[rows])
            out[rows].copy_(part)


_HALF = 256.0
"""e4m3 values, their exponent biased by 7, are those of float16, biased by 15, times this; subnormals too."""


_NARROW = 64
"""Rows of fewer elements are added up side by side: there are too few of them for a processor's vectors."""


def _scales(largest: Tensor) -> Tensor:
    """Of layers whose largest features are ``largest`` (float32)."""
    scales = largest / LARGEST
    # A layer of zeros, or so small that the division would lose it: any scale does.
    return torch.where(scales < torch.finfo(torch.float32).tiny, 1.0, scales)


def _on_device(layers: Tensor, stored: Tensor) -> tuple[Tensor, Tensor]:
    """Write e4m3 values of ``layers [n, L, H]`` into ``stored``, without waiting.

    Returns:
        float32 ``[n, L]``: scales; ``[2, n, L]``: sums of squares of the scaled features and of their errors, 1/256
        of a step of the scale being 1. Element by element and in one order of additions: so are the bits everywhere.
    """
    scales = _scales(layers.abs().amax(-1).float())
    scaled = layers.float().div_((scales * _HALF)[..., None])
    values = (scaled * _HALF).to(torch.float8_e4m3fn)
    stored.copy_(values, non_blocking=True)
    errors = values.float().div_(_HALF).sub_(scaled)
    return scales, _sums(torch.stack([scaled, errors]).square_())


def _on_host(tokens: int, dtype: torch.dtype, states: States) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """:func:`_on_device` for a CPU and at most ``tokens`` at a time."""
    loops = loops_for(dtype)
    if loops is None:
        return _OnHost(tokens, dtype, states)

    def encode(layers: Tensor, stored: Tensor) -> tuple[Tensor, Tensor]:
        scales, sums = torch.empty(layers.shape[:2]), torch.empty(2, *layers.shape[:2])
        rows, values = layers.flatten(1).view(torch.uint16).numpy(), stored.flatten(1).view(torch.uint8).numpy()
        if loops.fp8_encode(rows, states.hidden_size, values, scales.numpy(), sums.numpy()):
            return scales, sums
        # NaN and Inf go as they go everywhere.
        return _OnHost(len(layers), dtype, states)(layers, stored)

    return encode


class _OnHost:
    """:func:`_on_device` for a CPU, several times as fast: in memory that is used again and fits its cache, and without
    torch's casts of float8, which go element by element.

    Rounding is done by an addition: a float32 that is 2**20 times the feature's power of two has just the bits left
    that e4m3 has, and what was added is taken away again.
    """

    def __init__(self, tokens: int, dtype: torch.dtype, states: States):
        """``tokens``: most at a time; ``dtype``: of the rows."""
        shape = (tokens, states.layers, states.hidden_size)
        self._bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
        self._magnitudes = torch.empty(shape, dtype=self._bits)
        self._scaled_and_errors = torch.empty(2, *shape)
        self._power = torch.empty(shape, dtype=torch.int32)
        self._half = torch.empty(shape, dtype=torch.float16)
        self._signs = torch.empty(shape, dtype=self._bits)

    def __call__(self, layers: Tensor, stored: Tensor) -> tuple[Tensor, Tensor]:
        n = len(layers)
        magnitudes, power, half = self._magnitudes[:n], self._power[:n], self._half[:n]
        bits, squares = layers.view(self._bits), self._scaled_and_errors[:, :n]
        scaled, rounded = squares
        np.bitwise_and(bits.numpy(), torch.iinfo(self._bits).max, out=magnitudes.numpy())
        scales = _scales(magnitudes.amax(-1).view(layers.dtype).float())
        scaled.copy_(magnitudes.view(layers.dtype)).div_((scales * _HALF)[..., None])
        torch.bitwise_and(scaled.view(torch.int32), 0x7F800000, out=power)
        # Below 2**-14 steps are equal; 20 more in the exponent.
        power.clamp_min_((127 - 14) << 23).add_(20 << 23)
        torch.add(scaled, power.view(torch.float32), out=rounded).sub_(power.view(torch.float32))
        half.copy_(rounded)
        self._store(half, bits, stored)
        rounded.sub_(scaled)
        return scales, _sums(squares.square_())

    def _store(self, half: Tensor, bits: Tensor, stored: Tensor) -> None:
        """The exponent and three bits of mantissa of ``half``, and the signs of ``bits``."""
        found, signs = half.view(torch.int16).numpy(), self._signs[: len(bits)].numpy()
        np.right_shift(bits.numpy(), 8 * (bits.itemsize - 1), out=signs)
        np.bitwise_and(signs, 0x80, out=signs)
        np.right_shift(found, 7, out=found)
        np.bitwise_or(found, signs, out=found, casting="unsafe")
        np.copyto(stored.view(torch.int8).numpy(), found, casting="unsafe")


def _sums(terms: Tensor) -> Tensor:
    """Sums over the last dimension, in the memory of ``terms``: one half is added to the other until one is left.

    torch's own sum adds up in another order on each kind of device, and of vectors.
    """
    while terms.shape[-1] > _NARROW:
        terms = _halved(terms, -1)
    terms = terms.movedim(-1, 0).contiguous()
    while len(terms) > 1:
        terms = _halved(terms, 0)
    return terms[0]


def _halved(terms: Tensor, dim: int) -> Tensor:
    half, odd = divmod(terms.shape[dim], 2)
    terms.narrow(dim, 0, half).add_(terms.narrow(dim, half, half))
    if odd:
        terms.select(dim, half).copy_(terms.select(dim, 2 * half))
    return terms.narrow(dim, 0, half + odd)
