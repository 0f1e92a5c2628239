"""Every error this project raises on purpose. The message is written for the user, not for a traceback."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from typing import Any


class DFlashCacheError(Exception):
    """Base class: catch it to catch everything below."""


class InputError(DFlashCacheError):
    """An option, dataset or target that cannot be used as given; nothing was written."""


class NothingLeftError(InputError):
    """The options of a loader leave too few samples to read."""


class CacheError(DFlashCacheError):
    """A file of a cache is missing, damaged, hostile or not what the manifest says.

    ``path`` is the file (or folder) at fault; the message begins with it.
    """

    def __init__(self, path: str | os.PathLike[str], problem: str):
        self.path = os.fspath(path)
        self.problem = problem
        super().__init__(f"{self.path}: {problem}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.problem)


class WriterStoppedError(CacheError):
    """A reader waits for a shard, and nobody writes the cache any more. Go on once it is written again."""


class MismatchError(DFlashCacheError):
    """The cache is not the one that was asked for.

    ``fields`` maps a dotted field name to ``(what the cache has, what was asked for)``.
    """

    def __init__(self, headline: str, fields: Mapping[str, tuple[Any, Any]], advice: str = ""):
        self.headline = headline
        self.fields = dict(fields)
        self.advice = advice
        lines = [f"  {name}: cache has {have!r}, asked for {asked!r}" for name, (have, asked) in self.fields.items()]
        super().__init__("\n".join([headline, *lines, *([advice] if advice else [])]))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.headline, self.fields, self.advice)


_WAY_OUT = {
    errno.ENOSPC: "the disk is full; free some space and run the same command again, finished shards are kept",
    errno.EDQUOT: "the quota is used up; free some space and run the same command again, finished shards are kept",
    errno.EACCES: "permission denied; make the folder writable for this user and run the same command again",
    errno.EPERM: "permission denied; make the folder writable for this user and run the same command again",
    errno.EROFS: "the file system is read-only; remount it for writing and run the same command again",
    errno.EFBIG: "larger than this file system or this process may write (ulimit -f); raise the limit and run the same "
    "command again, finished shards are kept",
    errno.EIO: "the device reported an input/output error; check the disk, then run the same command again",
    errno.ENOENT: "the folder has vanished (was a mount lost?); bring it back and run the same command again",
    errno.ESTALE: "the network mount went away; mount it again and run the same command again",
}


class StorageError(DFlashCacheError):
    """The operating system refused a read or a write: ``path``, ``errno`` and what to do about it."""

    def __init__(self, path: str | os.PathLike[str], doing: str, cause: OSError):
        self.path = os.fspath(path)
        self.doing = doing
        self.errno = cause.errno
        reason = _WAY_OUT.get(cause.errno or 0, cause.strerror or str(cause))
        super().__init__(f"{self.path}: cannot {doing}: {reason} [{cause.strerror or type(cause).__name__}]")
        self._cause = (cause.errno or 0, cause.strerror or str(cause))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.doing, OSError(*self._cause))


class StoreError(StorageError):
    """An object store refused a read or a write, also when it was tried again: ``path`` is the URL."""

    def __init__(self, url: str, doing: str, reason: str):
        super().__init__(url, doing, OSError(0, reason))
        self.reason = reason
        self.args = (f"{url}: cannot {doing}: {reason}",)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.doing, self.reason)
