"""One writer a cache: an flock on ``.lock``, which dies with its process, and says who holds it."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cache_format.errors import DFlashCacheError, StorageError

LOCK_NAME = ".lock"


class LockedError(DFlashCacheError):
    """Another process is writing this cache."""


@contextmanager
def exclusive(cache: Path) -> Iterator[None]:
    """Hold the cache's writer lock; released on exit, and by the kernel if the process dies.

    Raises:
        LockedError: held by another process; names its host, pid and since when.
        StorageError: the operating system refused.
    """
    path = cache / LOCK_NAME
    try:
        fd = _acquire(path)
    except OSError as error:
        raise StorageError(path, "lock", error) from error
    try:
        yield
    finally:
        # Unlinked while still held: whoever opened the old file sees that its name is gone and tries again.
        path.unlink(missing_ok=True)
        os.close(fd)


def _acquire(path: Path) -> int:
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _describe(os.pread(fd, 4096, 0))
            os.close(fd)
            raise LockedError(
                f"{path.parent}: {holder} is writing this cache. Wait for it, or stop it; its lock goes with it."
            ) from None
        try:
            current = os.stat(path).st_ino == os.fstat(fd).st_ino
        except FileNotFoundError:
            current = False
        if current:
            since = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            text = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since})
            os.ftruncate(fd, 0)
            os.pwrite(fd, text.encode(), 0)
            return fd
        os.close(fd)


def _describe(text: bytes) -> str:
    try:
        holder = json.loads(text)
        return f"process {holder['pid']} on host {holder['host']} (since {holder['since']})"
    except (ValueError, KeyError, TypeError):
        return "another process"
