"""Writing past the page cache: a shard is written once and read much later, on another machine perhaps.

A buffered write copies every byte into the page cache, at the cost of the processor and of what was cached there; on
Linux O_DIRECT lets the disk take whole pages from where they are. File systems that refuse it get a buffered write.
"""

from __future__ import annotations

import errno
import fcntl
import os
import warnings
from typing import BinaryIO

import numpy as np

from cache_format.storage.commit import write_all
from cache_format.storage.host_memory import PAGE

_REFUSALS = (errno.EINVAL, errno.EFAULT, errno.EOPNOTSUPP)
"""What a file system without it says, or one that asks for another alignment, or memory that a device can't read."""


def write_direct(file: BinaryIO, data: np.ndarray) -> None:
    """Write all of ``data`` (uint8) at the position of ``file``, an unbuffered one.

    Past the page cache goes what fills whole pages of the file and lies on whole pages of memory, so the two have to
    agree modulo 4096; the rest, or all, is written as usual. Not durable before fsync, like any write.

    Raises:
        OSError: the operating system refused.
    """
    before = -file.tell() % PAGE
    if (data.ctypes.data + before) % PAGE == 0 and len(data) >= before + PAGE:
        write_all(file, data[:before].data)
        pages = data[before : before + (len(data) - before) // PAGE * PAGE]
        data = data[before + _write_pages(file, pages) :]
    write_all(file, data.data)


def _write_pages(file: BinaryIO, pages: np.ndarray) -> int:
    """Bytes of ``pages`` that were written, from the first on."""
    flags, written = fcntl.fcntl(file, fcntl.F_GETFL), 0
    try:
        fcntl.fcntl(file, fcntl.F_SETFL, flags | getattr(os, "O_DIRECT", 0))
        while written < len(pages) and written % PAGE == 0:
            written += file.write(pages[written:].data)
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        if error.errno == errno.EFAULT:
            warnings.warn(
                "the disk cannot take shards from where they are; they go through the page cache", stacklevel=2
            )
    finally:
        fcntl.fcntl(file, fcntl.F_SETFL, flags)
    return written
