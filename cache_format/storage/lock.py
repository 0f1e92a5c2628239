"""One writer a cache: an flock on ``.lock``. It dies with its process, and its file says who holds it.

Workers of one job share it: the first takes the lock alone, writes the job's name, and goes on sharing; others join
if they are of the same job. An exclusive lock taken while any of them lives fails, and so does joining another job.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cache_format.errors import CacheError, DFlashCacheError, StorageError
from cache_format.storage.commit import make_folder

LOCK_NAME = ".lock"

_GLIMPSE_SECONDS = 0.2
"""How long to doubt a holder: :func:`is_written` takes the lock for a moment, and the file may name a dead process."""

_TURN_SECONDS = 60.0
"""How long to wait for one that holds a lock for as long as a few small files take to write."""

_PAUSE_SECONDS, _UNKNOWN_SECONDS, _OWN_JOB_SECONDS = 0.05, 2.5, 60.0
"""How long to wait for a holder that has not said yet who it is, and for one of the same job to go from holding the
lock alone to sharing it: it makes and syncs folders meanwhile, on a busy disk."""


class LockedError(DFlashCacheError):
    """Another process is writing this cache."""


@contextmanager
def writing(
    cache: Path,
    job: str | None = None,
    first: Callable[[], None] = lambda: None,
    *,
    name: str = LOCK_NAME,
    patience: float = _GLIMPSE_SECONDS,
    make: bool = False,
) -> Iterator[Callable[[], bool]]:
    """Hold the cache's writer lock, alone or (with ``job``) together with the other workers of that job.

    Released on exit, and by the kernel if the process dies. ``first`` is called by the first worker of a job, while it
    is alone. What this yields says at the end of the work whether this worker is alone (again): to the last of a job it
    says True, and keeps the others out; where it says False this worker holds the lock no more.

    ``name`` is the lock's file in ``cache``; ``patience`` is how many seconds to wait for another holder. With ``make``
    the folder is made where it is not there (any more), and removed at the end if it is empty.

    Raises:
        LockedError: held by another process or job; names its host, pid and since when.
        CacheError: the lock's file is not a file of its own, so writing to it could harm another one.
        StorageError: the operating system refused.
    """
    path = cache / name
    try:
        fd = _acquire(path, job, first, patience, make)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise CacheError(path, "is a symbolic link, which could lead anywhere; remove it") from None
        raise StorageError(path, "lock", error) from error
    try:
        yield lambda: _flock(fd, fcntl.LOCK_EX)
    finally:
        _release(path, fd)
        if make:
            with suppress(OSError):
                cache.rmdir()


@contextmanager
def in_turn(folder: Path, name: str) -> Iterator[None]:
    """Keep others out while files of ``folder`` are changed together; they wait up to a minute. ``name``: of the lock.

    Raises:
        LockedError, CacheError, StorageError: as for :func:`writing`.
    """
    with writing(folder, name=name, patience=_TURN_SECONDS):
        yield


def is_written(cache: Path) -> bool:
    """Whether a process holds the cache's writer lock; for readers that wait for what it writes.

    Raises:
        StorageError: the operating system refused.
    """
    try:
        fd = os.open(cache / LOCK_NAME, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise StorageError(cache / LOCK_NAME, "open", error) from error
    try:
        return not _flock(fd, fcntl.LOCK_EX)
    finally:
        os.close(fd)


def _acquire(path: Path, job: str | None, first: Callable[[], None], patience: float, make: bool) -> int:
    since, waited_for_own = time.monotonic(), False
    while True:
        fd = _opened(path, make)
        if fd is None:
            continue
        try:
            if _take(path, fd, job, first):
                return fd
        except BaseException:
            _release(path, fd)
            raise
        holder, gone = _holder(fd), not _is_current(path, fd)
        os.close(fd)
        own = job is not None and holder.get("job") == job
        if own != waited_for_own:
            since, waited_for_own = time.monotonic(), own
        waited = time.monotonic() - since
        named = bool(holder) and not own and not gone and waited > patience
        if named or waited > (_OWN_JOB_SECONDS if own else max(_UNKNOWN_SECONDS, patience)):
            break
        time.sleep(_PAUSE_SECONDS)
    raise LockedError(
        f"{path.parent}: {describe_holder(holder)} is writing this cache. Wait, or stop it; its lock goes too."
    )


def _opened(path: Path, make: bool) -> int | None:
    """The lock's file; None where its folder is gone and may be made once more."""
    try:
        if make:
            make_folder(path.parent)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    except (FileNotFoundError, StorageError) as error:
        if make and FileNotFoundError in (type(error), type(error.__cause__)):
            return None
        raise
    try:
        _require_own_file(path, fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _require_own_file(path: Path, fd: int) -> None:
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        raise CacheError(path, "is not a regular file of its own (a pipe, a device, a hard link?); remove it")


def _take(path: Path, fd: int, job: str | None, first: Callable[[], None]) -> bool:
    """Lock the open file, alone or sharing with the same job, and say in it who holds it."""
    if not _flock(fd, fcntl.LOCK_EX):
        shared = job is not None and _flock(fd, fcntl.LOCK_SH) and _holder(fd).get("job") == job
        return shared and _is_current(path, fd)
    if not _is_current(path, fd):
        return False
    since = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    text = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since, "job": job})
    os.ftruncate(fd, 0)
    os.pwrite(fd, text.encode(), 0)
    first()
    return job is None or _flock(fd, fcntl.LOCK_SH)


def _release(path: Path, fd: int) -> None:
    # Unlinked while held alone: whoever opened the old file sees that its name is gone and tries again.
    # Where it cannot be unlinked (a disk gone bad), closing gives the lock back, and the file is of no account.
    try:
        if _flock(fd, fcntl.LOCK_EX) and _is_current(path, fd):
            path.unlink(missing_ok=True)
    except OSError:
        pass
    finally:
        os.close(fd)


def _flock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_current(path: Path, fd: int) -> bool:
    """Whether the open file is still the one of that name."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except OSError:
        return False


def _holder(fd: int) -> dict[str, Any]:
    try:
        holder = json.loads(os.pread(fd, 4096, 0))
    except (OSError, ValueError, RecursionError):
        return {}
    return holder if isinstance(holder, dict) else {}


def describe_holder(holder: dict[str, Any]) -> str:
    """A lock's holder, for a message."""
    if not {"pid", "host", "since"} <= set(holder):
        return "another process"
    return f"process {holder['pid']} on host {holder['host']} (since {holder['since']})"
