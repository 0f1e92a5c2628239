"""Names that stay inside a cache, and opening what they lead to."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from cache_format.errors import CacheError, StorageError


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
