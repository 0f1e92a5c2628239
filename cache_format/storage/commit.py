"""The commit of a file: the only place of this package that creates files.

Commit: write a temporary sibling, fsync it, rename it over the final name, fsync the folder. A file under its
final name is therefore whole, whatever happened to the process or the machine (the rename is atomic on POSIX).
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from cache_format.errors import StorageError

TEMPORARY_SUFFIX = ".tmp"


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
    except OSError as error:
        # Some network and FUSE file systems know no fsync of a folder; Python shows a warning of one place once.
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        warnings.warn(f"the file system of {folder} cannot fsync a folder; a power cut may lose names", stacklevel=2)
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
