"""Where the encoded samples of a shard go: one after the other, whichever is encoded first."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from cache_format.codecs.encoded_part import EncodedPart, write_all


class Places:
    """Parts of samples are put here in any order, by any threads, and each byte is written once, at its place.

    A part has a place once all parts before it are encoded. The thread that encoded the last of these writes what has
    a place by then; nobody waits. Until then a part keeps what it has encoded.
    """

    def __init__(self, out: np.ndarray, sizes_bytes: Sequence[int], parts: Sequence[int]):
        """``out``: uint8, large enough; of each sample what the sizes at its beginning take, and its parts."""
        self.starts = [0]
        """where each sample begins that has a place, then where the last ends"""
        self._out, self._sizes_bytes, self._parts = out, sizes_bytes, parts
        self._lock, self._waiting = threading.Lock(), dict[int, EncodedPart]()
        self._sample = self._next = self._parts_before = 0
        self._sizes_at, self._at = 0, sizes_bytes[0] if sizes_bytes else 0

    def put(self, number: int, part: EncodedPart) -> None:
        """Part ``number`` of all samples' parts; it may be written by the next call."""
        with self._lock:
            self._waiting[number] = part
            ready = []
            while self._next in self._waiting:
                ready.append(self._placed(self._waiting.pop(self._next)))
        for found, sizes_at, at in ready:
            write_all(self._out[sizes_at:], [found.sizes])
            found.write(self._out[at : at + found.num_bytes])

    def _placed(self, part: EncodedPart) -> tuple[EncodedPart, int, int]:
        """The next part, and where its sizes and its bytes go."""
        found = (part, self._sizes_at, self._at)
        self._next += 1
        self._sizes_at, self._at = self._sizes_at + part.sizes.nbytes, self._at + part.num_bytes
        if self._next == self._parts_before + self._parts[self._sample]:
            self.starts.append(self._at)
            self._parts_before, self._sample = self._next, self._sample + 1
            more = self._sizes_bytes[self._sample] if self._sample < len(self._sizes_bytes) else 0
            self._sizes_at, self._at = self._at, self._at + more
        return found
