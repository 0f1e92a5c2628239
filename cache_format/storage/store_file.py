"""A file of a store, open for reading: every read is a range of it."""

from __future__ import annotations

import threading

import numpy as np

from cache_format.errors import CacheError
from cache_format.storage.store import Store

_HEAD_BYTES = 64 << 10
"""Read at once when a shard is opened: its header, and the head of one with up to 2,500 samples."""


class StoreFile:
    """A file of a store as a :class:`cache_format.storage.byte_source.ByteSource`.

    What :meth:`keep` names is read once and kept in memory.
    """

    def __init__(self, store: Store, name: str, size: int):
        """``size``: its bytes, as the listing or a table says."""
        self.where, self.size = store.at(name), size
        self._store, self._name = store, name
        self._kept: list[tuple[int, int, np.ndarray | None]] = []
        self._lock = threading.Lock()
        self.keep(0, min(size, _HEAD_BYTES))

    def keep(self, start: int, stop: int) -> None:
        """See :class:`cache_format.storage.byte_source.ByteSource`."""
        if not any(first <= start and stop <= last for first, last, _ in self._kept):
            self._kept.append((start, stop, None))

    def read_into(self, offset: int, out: np.ndarray) -> None:
        """See :class:`cache_format.storage.byte_source.ByteSource`."""
        if offset + len(out) > self.size:
            raise CacheError(self.where, f"ends at byte {self.size:,}; truncated since it was opened")
        for i, (start, stop, _) in enumerate(self._kept):
            if start <= offset and offset + len(out) <= stop:
                out[:] = self._block(i)[offset - start : offset - start + len(out)]
                return
        self._store.read_into(self._name, offset, out)

    def close(self) -> None:
        """See :class:`cache_format.storage.byte_source.ByteSource`."""
        self._kept = []

    def _block(self, i: int) -> np.ndarray:
        with self._lock:
            start, stop, block = self._kept[i]
            if block is None:
                block = np.empty(stop - start, np.uint8)
                self._store.read_into(self._name, start, block)
                self._kept[i] = (start, stop, block)
            return block
