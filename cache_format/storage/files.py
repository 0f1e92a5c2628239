"""Paths inside a cache and the commit of a file: the only place of this package that creates files.

Commit: write a temporary sibling, fsync it, rename it over the final name, fsync the folder. A file under its
final name is therefore whole, whatever happened to the process or the machine (the rename is atomic on POSIX).
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from cache_format.errors import CacheError, StorageError

TEMPORARY_SUFFIX = ".tmp"


def is_plain(name: str) -> bool:
    """Whether ``name`` is a relative path with no ``..``, ``.``, backslash or empty part in it."""
    return not any(c in name for c in "\\\0") and not any(part in ("", ".", "..") for part in name.split("/"))


def inside(root: Path, name: str) -> Path:
    """The path of ``name`` below ``root``; a name that leads out of the cache is refused.

    Raises:
        CacheError: absolute, with ``..``, empty, or reaching outside through a symbolic link.
    """
    if not is_plain(name):
        raise CacheError(root, f"file name {name!r} is not a plain relative path; it could lead out of the cache")
    path = root / name
    if not _has_link(root, name):
        return path
    try:
        real = os.path.realpath(path, strict=True)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
            raise CacheError(path, f"cannot be followed: {error.strerror}") from None
        # Not there yet, or not to be looked at: what the names say counts.
        real = os.path.realpath(path)
    if not Path(real).is_relative_to(os.path.realpath(root)):
        raise CacheError(path, "leads out of the cache through a symbolic link")
    return path


def _has_link(root: Path, name: str) -> bool:
    """Whether a symbolic link stands on the way from ``root`` to ``name``, or may: what cannot be looked at counts."""
    place = os.fspath(root)
    for part in name.split("/"):
        place = f"{place}/{part}"
        try:
            if stat.S_ISLNK(os.lstat(place).st_mode):
                return True
        except FileNotFoundError:
            return False
        except OSError:
            return True
    return False


def open_for_reading(path: Path) -> int:
    """A file descriptor of a regular file.

    Raises:
        CacheError: there is no such file, or it is a folder, device or pipe.
        StorageError: the operating system refused.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        if not os.path.isfile(path):
            os.close(fd)
            raise CacheError(path, "is not a regular file")
    except (FileNotFoundError, NotADirectoryError):
        raise CacheError(path, "is missing") from None
    except OSError as error:
        raise StorageError(path, "open", error) from error
    return fd


def make_folder(path: Path) -> None:
    """Create ``path`` and its parents durably: the new name survives a power cut.

    Raises:
        StorageError: the operating system refused.
    """
    try:
        if not path.is_dir():
            make_folder(path.parent)
            path.mkdir(exist_ok=True)
            sync_folder(path.parent)
    except OSError as error:
        raise StorageError(path, "create the folder", error) from error


def sync_folder(folder: Path) -> None:
    """fsync a folder, so that a name created or renamed in it survives a power cut."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def committed(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary sibling of ``path`` for writing; on a clean exit it becomes ``path``, whole and durable.

    Raises:
        StorageError: the operating system refused (disk full, no permission, ...). ``path`` is as before.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    try:
        try:
            with open(temporary, "xb", buffering=0) as file:
                yield file
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
        finally:
            with suppress(OSError):
                temporary.unlink()
    except OSError as error:
        raise StorageError(path, "write", error) from error


def write_all(file: BinaryIO, data: bytes | memoryview) -> None:
    """Write every byte of ``data``: an unbuffered ``write`` may stop short (2 GiB limit of Linux, signals)."""
    view = memoryview(data).cast("B")
    while view:
        view = view[file.write(view) :]


def remove_temporaries(folder: Path) -> None:
    """Delete what an earlier, killed process left half-written in ``folder``. Call it with the lock held.

    Raises:
        StorageError: the operating system refused.
    """
    for path in folder.glob(f".*{TEMPORARY_SUFFIX}"):
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(path, "remove what an earlier run left", error) from error
