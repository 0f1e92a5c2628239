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

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from cache_format.codecs.entropy import coder
from cache_format.codecs.interface import BLOCK_STARTS, BlockCodec, HeadTensor, States

EXPONENTS = "hidden_states_exponents"

BLOCK_ELEMENTS = 1 << 17
"""A block has as many rows as hold at most this many elements, and at least one."""

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
        if len(rows):
            sampled = rows[np.linspace(0, len(rows) - 1, min(_SAMPLED_ROWS, len(rows))).astype(np.int64)]
            found = _exponents(_upper(sampled))
            middle = len(found) // 2
            exponents[: states.width] = np.partition(found, middle, axis=0)[middle]
        return {EXPONENTS: exponents}

    def most_bytes(self, num_tokens: int, states: States) -> int:
        """As much as before, and 4 bytes a block."""
        return num_tokens * states.row_bytes + 4 * len(list(_blocks(num_tokens, states.width)))

    def encode_sample(
        self,
        rows: np.ndarray,
        shared: Mapping[str, np.ndarray],
        out: np.ndarray,
        states: States,
        energy: np.ndarray,
    ) -> int:
        """See the top of the file."""
        usual = shared[EXPONENTS][: rows.shape[1]]
        blocks = list(_blocks(len(rows), rows.shape[1]))
        sizes, at = np.empty(len(blocks), "<u4"), 4 * len(blocks)
        compressor = coder()
        for number, block in enumerate(blocks):
            upper = _upper(rows[block])
            exponents = _exponents(upper) - usual
            coded = compressor.coded(exponents)
            sizes[number] = len(coded)
            at = _append(out, at, coded)
            at = _append(out, at, ((upper & 0x7F) | (upper >> 8 & 0x80)).astype(np.uint8))
            if rows.itemsize == 4:
                at = _append(out, at, (rows[block] & 0xFFFF).astype("<u2"))
        _append(out, 0, sizes)
        return at

    def decode_sample(
        self, stored: np.ndarray, shared: Mapping[str, np.ndarray], num_tokens: int, out: np.ndarray, states: States
    ) -> None:
        """See the top of the file."""
        width, rest = out.shape[1], out.itemsize - 1
        usual = shared[EXPONENTS][:width]
        blocks = list(_blocks(num_tokens, width))
        sizes = stored[: 4 * len(blocks)]
        if len(sizes) != 4 * len(blocks):
            raise ValueError("the sizes of its blocks are cut off")
        ends = np.cumsum([len(sizes), *(int(size) for size in sizes.view("<u4"))], dtype=np.int64)
        ends[1:] += np.cumsum([(block.stop - block.start) * width * rest for block in blocks], dtype=np.int64)
        if ends[-1] != len(stored):
            raise ValueError(f"it has {len(stored):,} bytes, its blocks {int(ends[-1]):,}")
        decompressor = coder()
        for block, start, stop in zip(blocks, ends[:-1].tolist(), ends[1:].tolist(), strict=True):
            if block.start >= len(out):
                return
            count = block.stop - block.start
            tail = stop - count * width * rest
            exponents = decompressor.decoded(stored[start:tail], count * width).reshape(count, width)
            bits = stored[tail : tail + count * width].reshape(count, width)
            lower = stored[tail + count * width : stop].view("<u2").reshape(count, width) if rest > 1 else None
            _join(out[block], exponents, usual, bits, lower)


_thread = threading.local()


def _scratch(shape: tuple[int, int]) -> np.ndarray:
    """uint16 of that shape, not cleared: memory that this thread uses again from block to block."""
    memory: np.ndarray | None = getattr(_thread, "memory", None)
    if memory is None or len(memory) < shape[0] * shape[1]:
        memory = _thread.memory = np.empty(shape[0] * shape[1], np.uint16)
    return memory[: shape[0] * shape[1]].reshape(shape)


def _blocks(num_tokens: int, width: int) -> Iterator[slice]:
    """The rows of each block of a sample."""
    rows = max(1, BLOCK_ELEMENTS // width)
    return (slice(start, min(start + rows, num_tokens)) for start in range(0, num_tokens, rows))


def _upper(rows: np.ndarray) -> np.ndarray:
    """The upper 16 bits of each element: sign, exponent and the first mantissa bits."""
    return rows if rows.itemsize == 2 else (rows >> 16).astype(np.uint16)


def _exponents(upper: np.ndarray) -> np.ndarray:
    """Bits 14..7: the exponent of bfloat16 and float32; of float16 the exponent and three bits of mantissa."""
    return (upper >> 7).astype(np.uint8)


def _append(out: np.ndarray, at: int, data: np.ndarray) -> int:
    raw = data.reshape(-1).view(np.uint8)
    out[at : at + len(raw)] = raw
    return at + len(raw)


def _join(
    out: np.ndarray,
    exponents: np.ndarray,
    usual: np.ndarray,
    bits: np.ndarray,
    lower: np.ndarray | None,
) -> None:
    """Put the elements ``out`` (perhaps fewer rows) together again, in passes that run at a vector unit's speed."""
    rows = len(out)
    upper = out if lower is None else _scratch(out.shape)
    # Sign-extended, the sign bit stands at bit 15 too.
    np.copyto(upper.view(np.int16), bits[:rows].view(np.int8))
    np.bitwise_and(upper, _SIGN_AND_MANTISSA, out=upper)
    wide = (exponents[:rows] + usual).astype(np.uint16)
    np.left_shift(wide, 7, out=wide)
    np.bitwise_or(upper, wide, out=upper)
    if lower is not None:
        np.copyto(out, upper)
        np.left_shift(out, 16, out=out)
        np.bitwise_or(out, lower[:rows], out=out)
