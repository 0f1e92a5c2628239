"""A file whose content was digested, and which must still hold it when what was read from it is used."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

Status = tuple[int, ...]


class WatchedFile:
    """A file and the digest of what it held; as long as nobody touches it, to ask again costs one system call."""

    def __init__(self, path: Path, digest_of: Callable[[Path], str]):
        """``digest_of`` reads the file, and raises if it cannot."""
        self.path, self._digest_of = path, digest_of
        # Before reading: what is changed while it is read has another status afterwards.
        self._status = _status(path)
        self.digest = digest_of(path)

    def is_changed(self, in_place: bool = False) -> bool:
        """Whether it now holds something else, or is gone; with ``in_place``: whether the very file was written to,
        which those see who have it mapped into memory, and not whether another one has its name now."""
        status = _status(self.path)
        if status == self._status:
            return False
        if in_place and (status is None or self._status is None or status[:2] != self._status[:2]):
            return False
        if status is None or self._digest_of(self.path) != self.digest:
            return True
        self._status = status
        return False


def _status(path: Path) -> Status | None:
    """Device, inode, size, and when content and inode were changed; None where it cannot be looked at."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
