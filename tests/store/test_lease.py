"""The lock of a cache at a URL: alive, dead, lost."""

from __future__ import annotations

import json
import subprocess
import sys
import time

from commands import wait_for
from s3 import put

from cache_format.storage import lease
from cache_format.storage.lease import leased
from cache_format.storage.lock import LOCK_NAME, LockedError
from cache_format.storage.store import Store


def test_a_lock_that_does_not_change_is_taken_over(bucket, quick, monkeypatch):
    monkeypatch.setattr(lease, "DEAD_SECONDS", 1.0)
    Store(bucket).put(LOCK_NAME, b'{"host": "gone", "pid": 7, "since": "long ago", "token": "x"}')
    told = []
    with leased(Store(bucket), told.append) as allowed:
        assert "process 7 on host gone" in told[0]
        allowed()
    assert Store(bucket).list() == {}


def test_a_dead_process_of_this_machine_blocks_nobody(bucket, quick):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    holder = {"host": "here", "pid": process.pid, "since": "", "machine": lease._machine(), "token": "x"}
    Store(bucket).put(LOCK_NAME, json.dumps(holder).encode())
    started = time.monotonic()
    with leased(Store(bucket)):
        assert time.monotonic() - started < 5


def test_who_has_lost_the_lock_stops(bucket, s3, quick, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.1)
    with leased(Store(bucket)) as allowed:
        # More than once: it may have been about to write its own again, and then the other one would stop.
        wait_for(lambda: put(s3, bucket, LOCK_NAME, b'{"token": "another"}') or _raises(allowed))
    assert Store(bucket).list() == {LOCK_NAME: 20}, "the other's lock stays"


def _raises(call) -> bool:
    try:
        call()
    except LockedError:
        return True
    return False
