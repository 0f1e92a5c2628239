"""A file in memory, its pages brought there before they are touched: what the disk will not give ends no process."""

from __future__ import annotations

import ctypes
import mmap
import sys

import numpy as np

_POPULATE_READ = 22
"""MADV_POPULATE_READ of Linux 5.14: reads pages, and fails where touching them would be a SIGBUS."""

_madvise = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None


class MappedFile:
    """The bytes of an open file. Threads may share it."""

    def __init__(self, fd: int):
        """
        Raises:
            OSError, ValueError: the system maps no such file.
        """
        # Copy-on-write, only because torch warns of memory that cannot be written to.
        self._bytes = np.frombuffer(mmap.mmap(fd, 0, access=mmap.ACCESS_COPY), np.uint8)
        self._start = self._bytes.ctypes.data

    def there(self, offset: int, size: int) -> np.ndarray | None:
        """uint8 ``[size]`` from ``offset``, in memory; None: read it, which says why if it cannot be."""
        first = offset // mmap.PAGESIZE * mmap.PAGESIZE
        if _madvise is None or offset + size > len(self._bytes):
            return None
        # Not mmap.madvise: that holds the interpreter's lock while the disk reads.
        arguments = ctypes.c_void_p(self._start + first), ctypes.c_size_t(offset + size - first)
        return None if _madvise(*arguments, _POPULATE_READ) else self._bytes[offset : offset + size]
