"""Where the blocks of encoded samples go: one after the other, whichever are encoded first."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import numpy as np

from cache_format.codecs.encoded_part import EncodedPart, write_all


class Places:
    """Parts of samples are put here in any order, by any threads, and each byte is written once, at its place.

    Blocks have a place once all that stand before them are encoded. The thread that encoded the last of these writes
    what has a place by then; nobody waits. Until then a part is kept.
    """

    def __init__(self, out: np.ndarray, sizes_bytes: Sequence[int], parts: Sequence[int], groups: int):
        """
        Args:
            out: uint8, large enough for all samples.
            sizes_bytes: of each sample, what the sizes of its blocks take.
            parts: of each sample, how many it has.
            groups: of each part.
        """
        self.starts = [0]
        """Where each sample begins whose place is known, then where the last ends."""
        self._out, self._lock, self._kept = out, threading.Lock(), dict[int, EncodedPart]()
        self._sizes_at = self._at = 0
        self._order = self._in_order(sizes_bytes, parts, groups)
        self._next = next(self._order, None)

    def put(self, number: int, part: EncodedPart) -> None:
        """Part ``number``, counted over all samples."""
        ready = []
        with self._lock:
            self._kept[number] = part
            while self._next is not None and self._next[0] in self._kept:
                number, group, is_last = self._next
                part = self._kept.pop(number) if is_last else self._kept[number]
                ready.append((part, group, self._sizes_at, self._at))
                self._sizes_at += part.sizes[group].nbytes
                self._at += part.num_bytes[group]
                self._next = next(self._order, None)
        for part, group, sizes_at, at in ready:
            write_all(self._out[sizes_at:], [part.sizes[group]])
            part.write(group, self._out[at : at + part.num_bytes[group]])

    def _in_order(
        self, sizes_bytes: Sequence[int], parts: Sequence[int], groups: int
    ) -> Iterator[tuple[int, int, bool]]:
        """Part, group, and whether it is the part's last, as they stand; taken further when one has its place."""
        first = 0
        for of_sizes, count in zip(sizes_bytes, parts, strict=True):
            self._sizes_at, self._at = self.starts[-1], self.starts[-1] + of_sizes
            for group in range(groups):
                for number in range(first, first + count):
                    yield number, group, group == groups - 1
            first += count
            self.starts.append(self._at)
