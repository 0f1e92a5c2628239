"""zbits: lossless. The exponents go through an entropy coder, the other bits are kept as they are.

Signs and mantissas of hidden states look like noise (7.97 of 8 bits, measured); their exponents do not. So each
element's upper 16 bits are split into the exponent byte (bits 14..7) and the byte of sign and mantissa (bits 15, 6..0).
Channels differ in scale by orders of magnitude, so each channel's usual exponent is first subtracted: 2.6 instead of
3.0 bits. Then Huffman coding (entropy.py).

A sample is cut into blocks of whole rows that fit a core's cache, each with its own Huffman table. Bytes of a sample:
a uint32 for each block, the bytes of its coded exponents; then block by block: coded exponents, signs and mantissas,
and for float32 the lower 16 bits. Exponents that do not get smaller are stored as they are (their size says so).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch

from cache_format.codecs.compiled import loops_for
from cache_format.codecs.encoded_part import EncodedPart, write_all
from cache_format.codecs.entropy import coder
from cache_format.codecs.interface import BLOCK_STARTS, BlockCodec, HeadTensor, States
from cache_format.codecs.row_runs import row_runs
from cache_format.codecs.thread_memory import thread_memory

EXPONENTS = "hidden_states_exponents"

BLOCK_ELEMENTS = 1 << 17
"""A block has as many rows as hold at most this many elements, and at least one."""

_AT_ONCE = 8
"""Blocks that are coded in one call, and by one thread."""

_MEDIANS_AT_ONCE = 4096
"""Channels whose exponents are compared at a time: those of the sampled rows fit a core's cache."""

_SAMPLED_ROWS = 129
_SIGN_AND_MANTISSA = np.uint16(0x807F)


@dataclass(frozen=True)
class ZbitsCodec(BlockCodec):
    """Stores ``hidden_states_blocks``; measured on bfloat16 states with outlier channels: 0.67 of raw."""

    name = "zbits"
    lossless = True
    expected_ratio = 0.69

    def head(self, states: States, num_samples: int) -> tuple[HeadTensor, ...]:
        """Where samples begin, and ``hidden_states_exponents`` U8 ``[L*H]`` (zeros up to a multiple of 8)."""
        return (
            HeadTensor(BLOCK_STARTS, "I64", (num_samples + 1,)),
            HeadTensor(EXPONENTS, "U8", (-(-states.width // 8) * 8,)),
        )

    def shared(self, rows: np.ndarray, states: States) -> dict[str, np.ndarray]:
        """Each channel's median exponent, over up to 129 rows spread evenly."""
        exponents = np.zeros(-(-states.width // 8) * 8, np.uint8)
        sampled = np.linspace(0, len(rows) - 1, min(_SAMPLED_ROWS, len(rows))).astype(np.int64)
        for start in range(0, states.width if len(rows) else 0, _MEDIANS_AT_ONCE):
            some = slice(start, min(start + _MEDIANS_AT_ONCE, states.width))
            exponents[some] = _medians(_exponents(_upper(rows[sampled, some])))
        return {EXPONENTS: exponents}

    def sizes_bytes(self, num_tokens: int, states: States) -> int:
        """4 for each block."""
        return 4 * len(_blocks(num_tokens, states.width))

    def parts(self, num_tokens: int, states: States) -> list[slice]:
        """Some blocks each."""
        return row_runs(num_tokens, _AT_ONCE * _block_rows(states.width)) or [slice(0, 0)]

    def encode_part(
        self, rows: np.ndarray, shared: Mapping[str, np.ndarray], states: States, energy: np.ndarray
    ) -> EncodedPart:
        """See the top of the file."""
        usual, loops = shared[EXPONENTS][: rows.shape[1]], loops_for(states.dtype)
        exponents = thread_memory("zbits' exponents", rows.shape, np.uint8)
        if loops is None:
            np.subtract(_exponents(_upper(rows)), usual, out=exponents)
        else:
            loops.zbits_exponents(rows, usual, exponents)
        coded = coder().coded([exponents[block] for block in _blocks(*rows.shape)])
        sizes = np.array([[len(block) for block in coded]], "<u4")
        return _Part(sizes, [sum(map(len, coded)) + rows.size * (rows.itemsize - 1)], rows, coded, loops)

    def decode_sample(
        self, stored: np.ndarray, shared: Mapping[str, np.ndarray], num_tokens: int, out: np.ndarray, states: States
    ) -> None:
        """See the top of the file."""
        width, rest = out.shape[1], out.itemsize - 1
        usual = shared[EXPONENTS][:width]
        blocks = _blocks(num_tokens, width)
        sizes = stored[: 4 * len(blocks)]
        if len(sizes) != 4 * len(blocks):
            raise ValueError("the sizes of its blocks are cut off")
        ends = np.cumsum([len(sizes), *(int(size) for size in sizes.view("<u4"))], dtype=np.int64)
        ends[1:] += np.cumsum([(block.stop - block.start) * width * rest for block in blocks], dtype=np.int64)
        if ends[-1] != len(stored):
            raise ValueError(f"it has {len(stored):,} bytes, its blocks {int(ends[-1]):,}")
        places = zip(blocks, ends[:-1].tolist(), ends[1:].tolist(), strict=True)
        wanted = [place for place in places if place[0].start < len(out)]
        for first in range(0, len(wanted), _AT_ONCE):
            some = wanted[first : first + _AT_ONCE]
            counts = [(block.stop - block.start) * width for block, _, _ in some]
            tails = [stop - count * rest for (_, _, stop), count in zip(some, counts, strict=True)]
            coded = [stored[start:tail] for (_, start, _), tail in zip(some, tails, strict=True)]
            for (block, _, stop), tail, exponents in zip(some, tails, coder().decoded(coded, counts), strict=True):
                _join(out[block], exponents.reshape(-1, width), usual, stored[tail:stop], states.dtype)


@dataclass(frozen=True, slots=True)
class _Part(EncodedPart):
    """Exponents, coded; the other bits are taken from the rows when they have a place, and are written once."""

    rows: np.ndarray
    coded: list[np.ndarray]
    loops: ModuleType | None

    def write(self, group: int, out: np.ndarray) -> None:
        """See :class:`EncodedPart`."""
        at, starts = 0, []
        for block, coded in zip(_blocks(*self.rows.shape), self.coded, strict=True):
            at += write_all(out[at:], [coded])
            starts.append(at)
            rows = self.rows[block]
            if self.loops is None:
                upper = _upper(rows)
                write_all(out[at:], [((upper & 0x7F) | (upper >> 8 & 0x80)).astype(np.uint8)])
            if rows.itemsize == 4:
                write_all(out[at + rows.size :], [(rows & 0xFFFF).astype("<u2")])
            at += rows.size * (rows.itemsize - 1)
        if self.loops is not None:
            self.loops.zbits_rest(self.rows, _block_rows(self.rows.shape[1]), np.array(starts, np.int64), out)


def _blocks(num_tokens: int, width: int) -> list[slice]:
    """The rows of each block of a sample."""
    return row_runs(num_tokens, _block_rows(width))


def _block_rows(width: int) -> int:
    return max(1, BLOCK_ELEMENTS // width)


def _upper(rows: np.ndarray) -> np.ndarray:
    """The upper 16 bits of each element: sign, exponent and the first mantissa bits."""
    return rows if rows.itemsize == 2 else (rows >> 16).astype(np.uint16)


def _exponents(upper: np.ndarray) -> np.ndarray:
    """Bits 14..7: the exponent of bfloat16 and float32; of float16 the exponent and three bits of mantissa."""
    return (upper >> 7).astype(np.uint8)


def _medians(values: np.ndarray) -> np.ndarray:
    """uint8: of each column of ``values [n, W]``, n up to 255, its value of rank ``n // 2``; bit by bit.

    A tenth of the time of ``np.partition``, which one encoder would take while the others wait.
    """
    found = np.zeros(values.shape[1], np.uint8)
    for bit in (128, 64, 32, 16, 8, 4, 2, 1):
        is_below = values < (found | np.uint8(bit))
        found[np.add.reduce(is_below.view(np.uint8), axis=0, dtype=np.uint8) <= len(values) // 2] |= np.uint8(bit)
    return found


def _join(out: np.ndarray, exponents: np.ndarray, usual: np.ndarray, tail: np.ndarray, dtype: torch.dtype) -> None:
    """Put the elements ``out`` (perhaps fewer rows) together again, in passes that run at a vector unit's speed."""
    rows, loops = len(out), loops_for(dtype)
    bits, lower = tail[: exponents.size].reshape(exponents.shape), tail[exponents.size :].view("<u2")
    if loops is not None:
        loops.zbits_join(exponents, usual, bits, out)
        return
    upper = out if not len(lower) else thread_memory("zbits' bits", out.shape, np.uint16)
    # Sign-extended, the sign bit stands at bit 15 too.
    np.copyto(upper.view(np.int16), bits[:rows].view(np.int8))
    np.bitwise_and(upper, _SIGN_AND_MANTISSA, out=upper)
    wide = (exponents[:rows] + usual).astype(np.uint16)
    np.left_shift(wide, 7, out=wide)
    np.bitwise_or(upper, wide, out=upper)
    if len(lower):
        np.copyto(out, upper)
        np.left_shift(out, 16, out=out)
        np.bitwise_or(out, lower.reshape(exponents.shape)[:rows], out=out)
