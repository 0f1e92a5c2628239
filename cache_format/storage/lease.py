"""One writing job a cache, at a URL: the object ``.lock``, put if new, and written again every few seconds.

A store has no lock that dies with its process. So a holder whose lock has not changed for a minute counts as dead; on
the same machine it is dead as soon as its process is. The lock saves work; it is not what keeps a cache right: jobs of
one identity write the same bytes, and a job of another identity is refused by the manifest.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from cache_format.errors import CacheError, StoreError
from cache_format.storage.lock import LOCK_NAME, LockedError, describe_holder
from cache_format.storage.store import Store

BEAT_SECONDS, DEAD_SECONDS = 10.0, 60.0
_POLL_SECONDS = 0.5


@contextmanager
def leased(store: Store, tell: Callable[[str], None] = lambda text: None) -> Iterator[Callable[[], None]]:
    """Hold the writer lock of the cache at ``store``. What this yields raises LockedError once it has been lost.

    The Hub keeps every write as a commit and has no put-if-new, so there is no lock there: start one job a cache.

    Raises:
        LockedError: another job is writing; names its host, pid and since when.
        StoreError: the store refused.
    """
    if store.url.startswith("hf:"):
        yield lambda: None
        return
    lease = _Lease(store)
    lease.acquire(tell)
    try:
        yield lease.require
    finally:
        lease.release()


class _Lease:
    def __init__(self, store: Store):
        self._store, self._beat, self._lost = store, 0, False
        self._stop = threading.Event()
        self._holder = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "machine": _machine(),
            "token": secrets.token_hex(8),
        }
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def acquire(self, tell: Callable[[str], None]) -> None:
        first, since = None, time.monotonic()
        while not self._store.put_new(LOCK_NAME, self._content()):
            found = self._read()
            if found is None:
                continue
            if first is None:
                first, since = found, time.monotonic()
                if not _is_dead_here(found):
                    tell(
                        f"{self._store.url}: {describe_holder(found)} holds its lock; looking for up to "
                        f"{DEAD_SECONDS:.0f} s whether it lives"
                    )
            if found != first:
                raise LockedError(
                    f"{self._store.url}: {describe_holder(found)} is writing this cache. Wait, or stop it."
                )
            if _is_dead_here(found) or time.monotonic() - since > DEAD_SECONDS:
                self._store.remove(LOCK_NAME)
                first = None
                continue
            time.sleep(_POLL_SECONDS)
        self._thread.start()

    def require(self) -> None:
        if self._lost:
            raise LockedError(f"{self._store.url}: another job has taken the lock over; this one stops")

    def release(self) -> None:
        self._stop.set()
        self._thread.join()
        # Its end must not hide an error; a lock that stays counts as dead in a minute.
        with suppress(StoreError, CacheError):
            if (self._read() or {}).get("token") == self._holder["token"]:
                self._store.remove(LOCK_NAME)

    def _keep(self) -> None:
        written = time.monotonic()
        while not self._stop.wait(BEAT_SECONDS):
            try:
                if (self._read() or {}).get("token") != self._holder["token"]:
                    self._lost = True
                    return
                self._beat += 1
                self._store.put(LOCK_NAME, self._content())
                written = time.monotonic()
            except (StoreError, CacheError):
                if time.monotonic() - written > DEAD_SECONDS:
                    self._lost = True
                    return

    def _content(self) -> bytes:
        return json.dumps({**self._holder, "beat": self._beat}).encode()

    def _read(self) -> dict[str, Any] | None:
        content = self._store.get(LOCK_NAME, 1 << 16)
        if content is None:
            return None
        try:
            found = json.loads(content)
        except ValueError:
            found = {}
        return found if isinstance(found, dict) else {}


def _machine() -> str:
    """This boot of this machine and this space of pids (a container has its own); '' where they cannot be told."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _is_dead_here(holder: dict[str, Any]) -> bool:
    """Whether it was a process of this machine that is there no more."""
    pid = holder.get("pid")
    if not _machine() or holder.get("machine") != _machine() or type(pid) is not int or pid < 1:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
