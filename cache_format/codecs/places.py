"""Where the blocks of encoded samples go: one after the other, whichever are encoded first."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

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
        self._order = _in_order(sizes_bytes, parts, groups)
        self._next = next(self._order, None)

    def put(self, number: int, part: EncodedPart) -> None:
        """Part ``number``, counted over all samples."""
        with self._lock:
            self._kept[number] = part
            ready = list(self._placed())
        for found, group, sizes_at, at in ready:
            write_all(self._out[sizes_at:], [found.sizes[group]])
            found.write(group, self._out[at : at + found.num_bytes[group]])

    def _placed(self) -> Iterator[tuple[EncodedPart, int, int, int]]:
        """Parts and groups that have a place by now: where their sizes go, and where their blocks."""
        while self._next is not None and self._next.part in self._kept:
            place = self._next
            if place.sizes_bytes is not None:
                self._sizes_at, self._at = self.starts[-1], self.starts[-1] + place.sizes_bytes
            part = self._kept.pop(place.part) if place.is_last_group else self._kept[place.part]
            yield part, place.group, self._sizes_at, self._at
            self._sizes_at += part.sizes[place.group].nbytes
            self._at += part.num_bytes[place.group]
            if place.ends_sample:
                self.starts.append(self._at)
            self._next = next(self._order, None)


class _Place(NamedTuple):
    part: int
    group: int
    sizes_bytes: int | None
    """of the sample that begins here"""
    is_last_group: bool
    ends_sample: bool


def _in_order(sizes_bytes: Sequence[int], parts: Sequence[int], groups: int) -> Iterator[_Place]:
    """As they stand."""
    first = 0
    for of_sizes, count in zip(sizes_bytes, parts, strict=True):
        for group, number in product(range(groups), range(count)):
            begins, is_last = group == number == 0, group == groups - 1
            yield _Place(first + number, group, of_sizes if begins else None, is_last, is_last and number == count - 1)
        first += count
