"""Several processes and one cache: one writes, readers get right values or a clear error, the dead block nobody."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import soak_kill
import torch
from jobs import contents

from cache_format import CacheError, FeatureCache
from cache_format.storage.lock import LOCK_NAME, writing


@pytest.fixture(scope="module")
def whole(job, tmp_path_factory) -> Path:
    """A complete cache, made as the races make theirs."""
    folder = tmp_path_factory.mktemp("race")
    assert soak_kill.run(["extract", *job, "--out", folder / "cache"], folder / "log") == 0
    return folder / "cache"


def test_of_two_extractions_one_wins_and_the_other_names_it(whole, job, tmp_path):
    expected = contents(whole)
    for attempt in range(5):
        out = tmp_path / f"cache-{attempt}"
        logs = [tmp_path / "one.log", tmp_path / "two.log"]
        racers = [soak_kill.start(["extract", *job, "--out", out], log) for log in logs]
        for racer in racers:
            racer.join()
        (winner, _), (loser, log) = sorted(zip(racers, logs, strict=True), key=lambda pair: pair[0].exitcode)
        assert (winner.exitcode, loser.exitcode) == (0, 2), [log.read_text() for log in logs]
        named = rf"process {winner.pid} on host {re.escape(socket.gethostname())} \(since \d{{4}}-\d\d-\d\dT[^)]+\)"
        assert re.search(named, log.read_text()), log.read_text()
        assert contents(out) == expected


def test_a_repair_waits_for_no_extraction(job, tmp_path):
    out, log = tmp_path / "cache", tmp_path / "log"
    extraction = soak_kill.start(["extract", *job, "--out", out], tmp_path / "extract.log")
    while not (out / "shards" / "shard-00000.safetensors").exists():
        time.sleep(0.001)
    os.kill(extraction.pid, signal.SIGSTOP)
    try:
        before = contents(out)
        assert soak_kill.run(["repair", out, "--yes"], log) == 2
        assert f"process {extraction.pid} on host" in log.read_text()
        assert contents(out) == before
    finally:
        os.kill(extraction.pid, signal.SIGCONT)
        extraction.join()
    assert extraction.exitcode == 0


def test_a_dead_holder_blocks_nobody(whole, job, tmp_path):
    out, log = tmp_path / "cache", tmp_path / "log"
    assert (
        soak_kill.run(["extract", *job, "--out", out], log, die_at=soak_kill.operations(whole.parent / "log") // 2)
        == -9
    )
    assert json.loads((out / LOCK_NAME).read_text())["pid"], "the file is left, the lock is not"
    assert soak_kill.run(["extract", *job, "--out", out], log) == 0, log.read_text()
    assert contents(out) == contents(whole)


HOLDER_WITH_A_CHILD = """
import multiprocessing, pathlib, sys, time
from cache_format.storage.lock import writing

if __name__ == "__main__":
    with writing(pathlib.Path(sys.argv[1])):
        child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
        child.start()
        print(child.pid, flush=True)
        time.sleep(60)
"""


def test_a_child_that_outlives_a_dead_holder_does_not_hold_the_lock(tmp_path):
    (tmp_path / "hold.py").write_text(HOLDER_WITH_A_CHILD)
    cache = tmp_path / "cache"
    cache.mkdir()
    holder = subprocess.Popen(
        [sys.executable, tmp_path / "hold.py", cache],
        stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )  # fmt: skip
    child = int(holder.stdout.readline())
    holder.kill()
    holder.wait()
    os.kill(child, 0)
    try:
        with writing(cache):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


class Readers:
    """Threads that read all the time: counts of right reads, and whatever else came out."""

    def __init__(self, **readings: Callable[[], None]):
        self.right: Counter[str] = Counter()
        self.errors: dict[str, set[str]] = {name: set() for name in readings}
        self.wrong: list[str] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._read, args=item) for item in readings.items()]

    def _read(self, name: str, reading: Callable[[], None]) -> None:
        while not self._stop.is_set():
            try:
                reading()
                self.right[name] += 1
            except CacheError as error:
                self.errors[name].add(str(error))
            except BaseException as error:
                self.wrong.append(f"{name}: {error!r}")
                return

    def __enter__(self) -> Readers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def test_readers_stay_right_while_a_shard_is_set_aside_and_made_again(whole, job, tmp_path):
    """Open ones go on with what they mapped; new ones get right values or are told what is wrong."""
    cache, log = shutil.copytree(whole, tmp_path / "cache"), tmp_path / "log"
    source = FeatureCache.open(whole)
    expected = [source[i].hidden_states[0].clone() for i in range(len(source))]

    def compare(reader: FeatureCache) -> None:
        for i in range(len(reader)):
            sample_id = int(reader.index.sample_id[i])
            assert torch.equal(reader[i].hidden_states[0], expected[sample_id]), f"sample {sample_id}"

    def load(reader: FeatureCache) -> None:
        for first, batch in zip(range(0, len(reader), 4), reader.loader(batch_size=4), strict=True):
            for row, wanted in zip(batch.hidden_states, expected[first : first + 4], strict=True):
                assert torch.equal(row[: len(wanted)], wanted), f"sample in the batch from {first}"

    held = FeatureCache.open(cache)
    compare(held)
    shard = cache / "shards" / "shard-00001.safetensors"
    damaged = bytearray(shard.read_bytes())
    damaged[70_000] ^= 1
    with Readers(
        held=lambda: compare(held),
        opened=lambda: compare(FeatureCache.open(cache, verify="sample")),
        unfinished=lambda: compare(FeatureCache.open(cache, verify="sample", allow_incomplete=True)),
        loaded=lambda: load(FeatureCache.open(cache, verify="sample")),
    ) as readers:
        for _ in range(2):
            (tmp_path / "bad").write_bytes(damaged)
            os.replace(tmp_path / "bad", shard)
            assert soak_kill.run(["repair", cache, "--yes"], log) == 1, log.read_text()
            time.sleep(0.2)
            assert soak_kill.run(["extract", *job, "--out", cache], log) == 0, log.read_text()
        before = readers.right.copy()
        while len(readers.right - before) < 4 and not readers.wrong:
            time.sleep(0.01)
    assert readers.wrong == []
    assert readers.errors["held"] == set(), "what is open needs no file again"
    assert readers.errors["opened"], "the damage was met"
    for error in set().union(*readers.errors.values()):
        assert re.search(r"shard-00001|not complete|index\.arrow|shards\.arrow", error), error
    assert all(readers.right[name] for name in readers.errors)
    assert {n: d for n, d in contents(cache).items() if not n.startswith("quarantine/")} == contents(whole)
