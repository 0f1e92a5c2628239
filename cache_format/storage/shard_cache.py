"""Whole shards on a local disk, bounded, least recently used first out; shared by the processes of a host.

A shard is downloaded under a temporary name whose space is reserved, checked, and renamed: what has its final name is
whole, whatever was killed. Removing a shard that somebody reads is safe: an open file stays readable.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cache_format.errors import CacheError, InputError, StorageError
from cache_format.storage.byte_source import LocalFile
from cache_format.storage.commit import TEMPORARY_SUFFIX, make_folder

_STRIPES = 64
"""Lock files: downloads of shards that share one wait for each other."""

_PATIENCE_SECONDS = 600.0


class ShardCache:
    """Shards in ``folder``, of together at most ``limit`` bytes (None: as many as there are)."""

    def __init__(self, folder: Path, limit: int | None):
        """Makes the folder.

        Raises:
            StorageError: the operating system refused.
        """
        self.folder, self.limit = folder, limit
        make_folder(folder)

    def get(self, name: str, size: int, fill: Callable[[Path], None]) -> LocalFile:
        """The file ``name``, opened; made by ``fill`` (which gets an existing file to write to) if it is not there.

        Raises:
            InputError: ``size`` alone is more than the limit.
            CacheError, StorageError: as ``fill`` raises them; the operating system refused.
        """
        found = self._used(name)
        if found is not None:
            return found
        with self._locked(f"stripe-{zlib.crc32(name.encode()) % _STRIPES}"):
            found = self._used(name)
            if found is not None:
                return found
            path = self.folder / name
            temporary = path.with_name(f".{name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
            for left in self.folder.glob(f".{name}.*{TEMPORARY_SUFFIX}"):
                left.unlink(missing_ok=True)
            try:
                self._reserve(temporary, size)
                fill(temporary)
                with self._locked("room"):
                    # Not while somebody counts: a file is missed that changes its name between listing and looking.
                    os.replace(temporary, path)
                return LocalFile(path)
            except OSError as error:
                raise StorageError(path, "write", error) from error
            finally:
                with suppress(OSError):
                    temporary.unlink()

    def _used(self, name: str) -> LocalFile | None:
        path = self.folder / name
        try:
            file = LocalFile(path)
        except CacheError:
            return None
        with suppress(OSError):
            os.utime(path)
        return file

    def _reserve(self, temporary: Path, size: int) -> None:
        """Make an empty file of ``size`` bytes, once there is room for it."""
        if self.limit is not None and size > self.limit:
            raise InputError(f"cache_limit={self.limit:,} bytes: a shard has {size:,}; give room for several")
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            with self._locked("room"):
                if self._make_room(size):
                    with open(temporary, "xb") as file:
                        file.truncate(size)
                    return
            if time.monotonic() > deadline:
                raise StorageError(self.folder, "make room", OSError(0, "all of it is taken by unfinished downloads"))
            time.sleep(0.2)

    def _make_room(self, size: int) -> bool:
        if self.limit is None:
            return True
        shards, total = [], size
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):
                status = path.stat()
                total += status.st_size
                if path.suffix == ".safetensors":
                    shards.append((status.st_mtime_ns, status.st_size, path))
                elif path.suffix == TEMPORARY_SUFFIX and self._is_abandoned(path):
                    path.unlink(missing_ok=True)
                    total -= status.st_size
        for _, bytes_, path in sorted(shards):
            if total <= self.limit:
                break
            path.unlink(missing_ok=True)
            total -= bytes_
        return total <= self.limit

    def _is_abandoned(self, temporary: Path) -> bool:
        """Whether the process that downloaded it is gone: its lock is free."""
        name = temporary.name[1:].rsplit(".", 2)[0]
        try:
            with self._locked(f"stripe-{zlib.crc32(name.encode()) % _STRIPES}", wait=False):
                return True
        except BlockingIOError:
            return False

    @contextmanager
    def _locked(self, what: str, wait: bool = True) -> Iterator[None]:
        fd = os.open(self.folder / f".{what}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            yield
        finally:
            os.close(fd)
