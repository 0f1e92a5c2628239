"""Huffman coding of bytes by zstd, its search for repetitions all but switched off.

What comes here has none: looking for them makes files larger and decoding half as fast. Bytes that do not get smaller
are stored as they are; their size says so.
"""

from __future__ import annotations

import threading

import numpy as np
import zstandard


class Coder:
    """A compressor and a decompressor; not thread-safe, see :func:`coder`."""

    def __init__(self) -> None:
        parameters = zstandard.ZstdCompressionParameters(
            window_log=17,
            hash_log=6,
            chain_log=6,
            search_log=1,
            min_match=7,
            target_length=0,
            strategy=zstandard.STRATEGY_FAST,
            write_content_size=True,
        )
        self._compressor = zstandard.ZstdCompressor(compression_params=parameters)
        self._decompressor = zstandard.ZstdDecompressor()

    def coded(self, data: np.ndarray) -> np.ndarray:
        """uint8: contiguous ``data`` (of 1-byte elements) coded, or as it is where that is not smaller."""
        found = self._compressor.compress(data.reshape(-1).data)
        return np.frombuffer(found, np.uint8) if len(found) < data.size else data.reshape(-1).view(np.uint8)

    def decoded(self, coded: np.ndarray, count: int) -> np.ndarray:
        """uint8 ``[count]`` of what :meth:`coded` gave.

        Raises:
            ValueError: they are of another number, or damaged.
        """
        if len(coded) == count:
            return coded
        try:
            # Before anything is allocated: a frame may claim any size.
            if zstandard.frame_content_size(coded.data) != count:
                raise ValueError("what it has coded is not of its size")
            return np.frombuffer(self._decompressor.decompress(coded.data), np.uint8, count)
        except zstandard.ZstdError as error:
            raise ValueError(f"what it has coded is damaged ({error})") from None


_thread = threading.local()


def coder() -> Coder:
    """This thread's."""
    found: Coder | None = getattr(_thread, "coder", None)
    if found is None:
        found = _thread.coder = Coder()
    return found
