"""Where the bytes of a shard come from: a size and positional reads, whatever is behind them."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Protocol

import numpy as np

from cache_format.errors import CacheError, StorageError
from cache_format.storage.mapped_file import MappedFile
from cache_format.storage.paths import open_for_reading


class ByteSource(Protocol):
    """An open file of a known size. Threads may share it: reads carry their own offsets."""

    where: str
    """path or URL, for messages"""
    size: int
    """bytes"""

    def read_into(self, offset: int, out: np.ndarray) -> None:
        """Fill ``out`` (uint8, contiguous) with the bytes from ``offset``.

        Raises:
            CacheError: the file ended early.
            StorageError: the operating system, or the store, refused.
        """

    def keep(self, start: int, stop: int) -> None:
        """Say that bytes ``start`` to ``stop`` will be read in small pieces: a remote source reads them at once."""

    def close(self) -> None:
        """Give back what is held. Closing twice is harmless."""


class LocalFile:
    """A regular file, read through its descriptor."""

    def __init__(self, path: Path):
        """Open ``path``.

        Raises:
            CacheError: there is no such file, or it is a folder, device or pipe.
            StorageError: the operating system refused.
        """
        self.where, self.path = str(path), path
        self._fd = open_for_reading(path)
        self.size = os.fstat(self._fd).st_size
        self._mapped: MappedFile | None = None

    def read_into(self, offset: int, out: np.ndarray) -> None:
        """See :class:`ByteSource`."""
        view = out.data
        try:
            while view:
                count = os.preadv(self._fd, [view], offset)
                if count == 0:
                    raise CacheError(self.where, f"ends at byte {offset:,}; truncated since it was opened")
                view, offset = view[count:], offset + count
        except OSError as error:
            raise StorageError(self.where, "read", error) from error

    def read_strided_into(self, offset: int, stride: int, out: np.ndarray) -> None:
        """Fill row i of ``out`` (uint8 ``[n, bytes]``, rows contiguous) with the bytes from ``offset + i * stride``.

        Raises:
            CacheError, StorageError: as :meth:`read_into`.
        """
        size = out.shape[1]
        try:
            for row in out:
                if os.preadv(self._fd, [row], offset) != size:
                    self.read_into(offset, row)
                offset += stride
        except OSError as error:
            raise StorageError(self.where, "read", error) from error

    def there(self, offset: int, size: int) -> np.ndarray | None:
        """The bytes from ``offset`` as they lie in the page cache, uint8 ``[size]``: to be worked on without a copy.
        None where the system does not give them so; :meth:`read_into` then does, or says why not."""
        if self._mapped is None:
            try:
                self._mapped = MappedFile(self._fd)
            except (OSError, ValueError):
                return None
        return self._mapped.there(offset, size)

    def keep(self, start: int, stop: int) -> None:
        """Nothing: the system's page cache does it."""

    def map(self) -> mmap.mmap:
        """The file in memory; writing to it changes no file.

        Raises:
            StorageError: the operating system refused.
        """
        try:
            return mmap.mmap(self._fd, 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise StorageError(self.where, "map", OSError(getattr(error, "errno", None) or 0, str(error))) from error

    @property
    def is_removed(self) -> bool:
        """Whether its name is gone, so that closing it frees the disk."""
        return os.fstat(self._fd).st_nlink == 0

    def close(self) -> None:
        """See :class:`ByteSource`."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()
