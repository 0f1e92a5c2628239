"""Huffman coding of bytes by zstd, its search for repetitions all but switched off.

What comes here has none: looking for them makes files larger and decoding half as fast. Bytes that do not get smaller
are stored as they are; their size says so.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import compress
from typing import Any

import numpy as np
import zstandard

_IN_ONE_CALL = {"multi_compress_to_buffer", "multi_decompress_to_buffer"} <= set(zstandard.backend_features)
"""False where zstandard was built for the system's zstd, as some distributions do; or has no C."""


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

    def coded(self, data: Sequence[np.ndarray]) -> list[np.ndarray]:
        """uint8: each of contiguous ``data`` (of 1-byte elements) coded, or as it is where that is not smaller.

        All in one call, which lets other threads run: to come back takes as long as to code some thousand bytes.
        """
        plain = [part.reshape(-1).view(np.uint8) for part in data]
        if not plain:
            return []
        found: Any
        if _IN_ONE_CALL:
            found = self._compressor.multi_compress_to_buffer([part.data for part in plain], threads=1)
        else:
            found = [self._compressor.compress(part.data) for part in plain]
        coded = [np.frombuffer(found[number], np.uint8) for number in range(len(plain))]
        return [part if len(part) < len(whole) else whole.copy() for part, whole in zip(coded, plain, strict=True)]

    def decoded(self, coded: Sequence[np.ndarray], counts: Sequence[int]) -> list[np.ndarray]:
        """uint8 ``[count]`` each, of what :meth:`coded` gave; read only.

        Raises:
            ValueError: they are of another number, or damaged.
        """
        is_coded = [len(part) != count for part, count in zip(coded, counts, strict=True)]
        sizes = list(compress(counts, is_coded))
        frames: Any = [part.data for part in compress(coded, is_coded)]
        found: Any = []
        try:
            # Before anything is allocated: a frame may claim any size.
            if [zstandard.frame_content_size(frame) for frame in frames] != sizes:
                raise ValueError("a frame claims another size")
            if not _IN_ONE_CALL:
                found = [self._decompressor.decompress(frame) for frame in frames]
            elif frames:
                of_sizes = np.array(sizes, np.uint64).tobytes()
                found = self._decompressor.multi_decompress_to_buffer(frames, of_sizes, threads=1)
        except (zstandard.ZstdError, ValueError) as error:
            raise ValueError(f"what it has coded is damaged ({error})") from None
        parts = iter([np.frombuffer(found[number], np.uint8) for number in range(len(frames))])
        return [next(parts) if is_frame else _read_only(part) for is_frame, part in zip(is_coded, coded, strict=True)]


def _read_only(part: np.ndarray) -> np.ndarray:
    view = part.view()
    view.flags.writeable = False
    return view


_thread = threading.local()


def coder() -> Coder:
    """This thread's."""
    found: Coder | None = getattr(_thread, "coder", None)
    if found is None:
        found = _thread.coder = Coder()
    return found
