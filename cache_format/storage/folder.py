"""The files of a cache by name, for reading: in a local folder, or at a URL with the small ones fetched.

What reads a cache (reader, verify, inspect, export, recode) asks for files here and does not know where they are.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import weakref
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from cache_format.errors import CacheError, StorageError
from cache_format.storage.byte_source import ByteSource, LocalFile
from cache_format.storage.commit import TEMPORARY_SUFFIX, make_folder
from cache_format.storage.file_info import FileInfo, file_info
from cache_format.storage.paths import inside
from cache_format.storage.shard_cache import ShardCache
from cache_format.storage.store import Store, is_url
from cache_format.storage.store_file import StoreFile

Check = Callable[[Path], None]
"""Looks at a shard that was downloaded; raises CacheError where it is damaged."""


class Folder(Protocol):
    """Where a cache is read from."""

    where: str
    """path or URL, for messages"""
    path: Path
    """the local folder in which :meth:`local` has files"""

    @property
    def readers(self) -> Executor | None:
        """Threads that wait for a store side by side; None where shards are read from the disk."""

    def names(self, folder: str) -> list[str]:
        """Everything in ``folder`` of the cache, by its name there."""

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none.

        Raises:
            CacheError: it leads out of the cache.
        """

    def has(self, name: str) -> bool:
        """Whether there is such a file."""

    def stamp(self, name: str) -> str:
        """What changes whenever the file is written anew: its size and time, or what a store says of it.

        Raises:
            CacheError: it is missing.
        """

    def stamps(self) -> dict[str, str]:
        """Of each file as it is now, of links themselves: what changes whenever it is written anew.

        Raises:
            StorageError, StoreError: the operating system or the store refused.
        """

    def local(self, name: str) -> Path:
        """A local file with that content.

        Raises:
            CacheError: it is missing, or leads out of the cache.
        """

    def checked(self, name: str, expected: FileInfo | None) -> Path:
        """As :meth:`local`, its checksum compared.

        Raises:
            CacheError: missing or damaged.
        """

    def open(self, name: str, size: int | None = None, check: Check | None = None) -> ByteSource:
        """A shard for reading parts of it. ``size``: its bytes, where they are known.

        Raises:
            CacheError: it is missing.
        """

    def open_whole(self, name: str) -> LocalFile:
        """A shard for reading all of it: a file on the local disk, which goes with its last user.

        Raises:
            CacheError: it is missing.
        """


def open_folder(place: str | os.PathLike[str]) -> LocalFolder | StoreFolder:
    """The cache in a local folder, or at a URL such as ``s3://bucket/prefix``.

    Raises:
        InputError: a URL that cannot be used.
    """
    return StoreFolder(Store(place)) if isinstance(place, str) and is_url(place) else LocalFolder(Path(place))


def shard_bytes(place: str | os.PathLike[str]) -> int:
    """Bytes of all shard files of the cache in a local folder, or at a URL."""
    folder = open_folder(place)
    total = 0
    for name in folder.names("shards"):
        with suppress(CacheError):
            total += (folder.size(f"shards/{name}") or 0) if name.endswith(".safetensors") else 0
    return total


def _stamp(found: os.stat_result) -> str:
    return f"{found.st_size}-{found.st_mtime_ns}"


class LocalFolder:
    """A :class:`Folder` on a disk."""

    def __init__(self, path: Path):
        self.path, self.where = path, str(path)
        self.readers: Executor | None = None

    def names(self, folder: str) -> list[str]:
        """See :class:`Folder`."""
        return sorted(os.listdir(self.path / folder)) if (self.path / folder).is_dir() else []

    def size(self, name: str) -> int | None:
        """See :class:`Folder`."""
        path = inside(self.path, name)
        return path.stat().st_size if path.is_file() else None

    def has(self, name: str) -> bool:
        """See :class:`Folder`."""
        return (self.path / name).is_file()

    def stamp(self, name: str) -> str:
        """See :class:`Folder`."""
        path = self.local(name)
        try:
            found = path.stat()
        except OSError as error:
            raise StorageError(path, "look at", error) from error
        return _stamp(found)

    def stamps(self) -> dict[str, str]:
        """See :class:`Folder`; of the files of the cache and of the folders in it."""
        found: dict[str, str] = {}
        for below in ("", "samples/", "shards/", "target/"):
            folder = self.path / below
            if not folder.is_dir() or (below and folder.is_symlink()):
                continue
            try:
                for entry in os.scandir(folder):
                    with suppress(FileNotFoundError):
                        found[below + entry.name] = _stamp(entry.stat(follow_symlinks=False))
            except OSError as error:
                raise StorageError(folder, "list", error) from error
        return found

    def local(self, name: str) -> Path:
        """See :class:`Folder`."""
        path = inside(self.path, name)
        if not os.path.lexists(path):
            raise CacheError(path, "is missing")
        return path

    def checked(self, name: str, expected: FileInfo | None) -> Path:
        """See :class:`Folder`."""
        path = self.local(name)
        if not _matches(path, expected):
            raise _damaged(path, self.where)
        return path

    def open(self, name: str, size: int | None = None, check: Check | None = None) -> LocalFile:
        """See :class:`Folder`."""
        return LocalFile(inside(self.path, name))

    def open_whole(self, name: str) -> LocalFile:
        """See :class:`Folder`."""
        return self.open(name)


class StoreFolder:
    """A :class:`Folder` at a URL. Small files are fetched when they are first asked for."""

    def __init__(self, store: Store, path: Path | None = None, shards: ShardCache | None = None, key: str = ""):
        """
        Args:
            store: the cache's URL.
            path: where small files are kept; None: a temporary folder that goes with this object.
            shards: keeps whole shards; None: their bytes are read by range.
            key: tells this cache's shards from others there.
        """
        self.store, self.where, self.shards, self._key = store, store.url, shards, key
        self._listing: dict[str, int] | None = None
        self._stamps: dict[str, str] | None = None
        self._readers: tuple[int, Executor] | None = None
        if path is None:
            path = Path(tempfile.mkdtemp(prefix="dflash-cache-"))
            weakref.finalize(self, _remove_if_mine, path, os.getpid())
        self.path = path

    @property
    def readers(self) -> Executor | None:
        """See :class:`Folder`."""
        if self.shards is not None:
            return None
        if self._readers is None or self._readers[0] != os.getpid():
            self._readers = (os.getpid(), ThreadPoolExecutor(16, thread_name_prefix="store-reader"))
        return self._readers[1]

    @property
    def listing(self) -> dict[str, int]:
        """Every file: name -> bytes, from one listing of the store."""
        if self._listing is None:
            self._listing = self.store.list()
        return self._listing

    def names(self, folder: str) -> list[str]:
        """See :class:`Folder`."""
        below = f"{folder}/"
        return sorted({name.removeprefix(below).split("/")[0] for name in self.listing if name.startswith(below)})

    def size(self, name: str) -> int | None:
        """See :class:`Folder`."""
        return self.store.size(name) if self._listing is None else self._listing.get(name)

    def has(self, name: str) -> bool:
        """See :class:`Folder`."""
        return self.size(name) is not None

    def stamp(self, name: str) -> str:
        """See :class:`Folder`. From one listing, made at the first call."""
        if self._stamps is None:
            self._stamps = self.store.stamps()
        if name not in self._stamps:
            raise CacheError(self.store.at(name), "is missing")
        return self._stamps[name]

    def stamps(self) -> dict[str, str]:
        """See :class:`Folder`; a listing for each call."""
        return self.store.stamps()

    def local(self, name: str) -> Path:
        """See :class:`Folder`."""
        path = inside(self.path, name)
        if not path.exists():
            make_folder(path.parent)
            temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
            try:
                self._fetch(name, temporary)
                os.replace(temporary, path)
            except OSError as error:
                raise StorageError(path, "write", error) from error
            finally:
                with suppress(OSError):
                    temporary.unlink()
        return path

    def checked(self, name: str, expected: FileInfo | None) -> Path:
        """See :class:`Folder`. A file that an earlier run fetched and that does not match is fetched anew."""
        was_there = inside(self.path, name).exists()
        if not was_there and expected is not None and self._size(name) != expected.bytes:
            raise _damaged(self.store.at(name), self.where)
        path = self.local(name)
        if was_there and not _matches(path, expected):
            path.unlink(missing_ok=True)
            path = self.local(name)
        if not _matches(path, expected):
            raise _damaged(self.store.at(name), self.where)
        return path

    def open(self, name: str, size: int | None = None, check: Check | None = None) -> ByteSource:
        """See :class:`Folder`."""
        size = self._size(name) if size is None else size
        if self.shards is None:
            return StoreFile(self.store, name, size)

        def fill(path: Path) -> None:
            self.store.fetch(name, path, size)
            if check is not None:
                check(path)

        return self.shards.get(f"{self._key}-{name.rpartition('/')[2]}", size, fill)

    def open_whole(self, name: str) -> LocalFile:
        """See :class:`Folder`."""
        make_folder(self.path / "shards")
        path = self.path / "shards" / f"{secrets.token_hex(4)}{TEMPORARY_SUFFIX}"
        try:
            self._fetch(name, path)
            file = LocalFile(path)
            file.where = self.store.at(name)
            return file
        finally:
            path.unlink(missing_ok=True)

    def _fetch(self, name: str, path: Path) -> None:
        size = self._size(name)
        try:
            path.touch(exist_ok=False)
            self.store.fetch(name, path, size)
        except OSError as error:
            raise StorageError(path, "write", error) from error

    def _size(self, name: str) -> int:
        size = self.size(name)
        if size is None:
            raise CacheError(self.store.at(name), "is missing")
        return size


def _matches(path: Path, expected: FileInfo | None) -> bool:
    # The size first: a file of any size may be there.
    return (
        expected is not None
        and path.is_file()
        and path.stat().st_size == expected.bytes
        and file_info(path) == expected
    )


def _damaged(name: str | Path, cache: str) -> CacheError:
    return CacheError(
        name,
        f"does not match its checksum; to mend it run `dflash-cache repair {cache}`, then the cache's extract command",
    )


def _remove_if_mine(path: Path, pid: int) -> None:
    """A forked worker must not remove its parent's folder."""
    if os.getpid() == pid:
        shutil.rmtree(path, ignore_errors=True)
