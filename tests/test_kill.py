"""SIGKILL at any instant, then the same command again: the bytes of an uninterrupted run."""

from __future__ import annotations

import random
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import soak_kill
from jobs import contents

from cache_format.layout.manifest import Manifest
from cache_format.upkeep.repair import QUARANTINE_NAME
from cache_format.upkeep.verify import verify
from extractor.job.run_shards import NUM_BUFFERS

KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def job(job) -> list[str]:
    """A third of the samples in smaller shards: it is run two hundred times."""
    return [*job, "--limit", "40", "--shard-size", "512KiB"]


@pytest.fixture(scope="module")
def soaked(job, tmp_path_factory) -> Path:
    """Folder of 20 kills of that job: its log, and ``whole``, an uninterrupted run's cache (in several parts)."""
    folder = tmp_path_factory.mktemp("soak")
    report = soak_kill.soak(job, folder, kills=20, seed=1)
    assert report.kills >= 20
    assert report.jobs >= 1
    # The shard that the target is at, and those that are being written.
    assert 1 <= max(report.lost) <= NUM_BUFFERS
    assert (report.differing_bytes, report.failures) == (0, [])
    return folder


def test_twenty_kills_change_no_byte(soaked):
    assert verify(soaked / "whole").whole
    kept = {p.name for p in soaked.iterdir()}
    assert kept == {"log", "log.begun", "log.count", "whole"}, "what differs is kept"


def unsealed(whole: Path, out: Path) -> Path:
    """A copy in which every shard is finished, and no table."""
    cache = shutil.copytree(whole, out)
    manifest = Manifest.read(cache)
    tables = ("index.arrow", "shards.arrow")
    for name in tables:
        (cache / name).unlink()
    files = {name: info for name, info in manifest.files.items() if name not in tables}
    replace(manifest, state="extracting", files=files).write(cache)
    return cache


def test_killed_at_each_operation_of_the_seal(soaked, job, tmp_path):
    log = tmp_path / "log"
    arguments = ["extract", *job, "--out"]
    whole = contents(soaked / "whole")
    assert soak_kill.run([*arguments, unsealed(soaked / "whole", tmp_path / "first")], log) == 0
    steps = soak_kill.operations(log)
    states = set()
    for step in range(1, steps + 1):
        cache = unsealed(soaked / "whole", tmp_path / str(step))
        assert soak_kill.run([*arguments, cache], log, die_at=step) == KILLED
        states.add(soak_kill.state_of(cache))
        if step % 3 == 0:
            # A kill during the resume, too, at the same place
            soak_kill.run([*arguments, cache], log, die_at=step)
        assert soak_kill.run([*arguments, cache], log) == 0, log.read_text()
        assert contents(cache) == whole, f"killed at operation {step}"
    assert {"complete", "extracting: all shards, 1 tables", "extracting: all shards, 2 tables"} <= states


def damaged(whole: Path, out: Path) -> Path:
    cache = shutil.copytree(whole, out)
    for number in (1, 3):
        path = cache / "shards" / f"shard-{number:05d}.safetensors"
        data = bytearray(path.read_bytes())
        data[70_000] ^= 1
        path.write_bytes(data)
    return cache


def test_killed_at_each_operation_of_a_repair(soaked, job, tmp_path):
    log = tmp_path / "log"
    whole = contents(soaked / "whole")
    bad = contents(damaged(soaked / "whole", tmp_path / "first"))
    assert soak_kill.run(["repair", tmp_path / "first"], log) == 1
    steps = soak_kill.operations(log)
    for step in random.Random(0).sample(range(1, steps + 1), 20):
        cache = damaged(soaked / "whole", tmp_path / str(step))
        assert soak_kill.run(["repair", cache], log, die_at=step) == KILLED
        if verify(cache, quick=True).whole:
            assert contents(cache).items() >= bad.items(), "nothing was begun"
        elif Manifest.read(cache).state == "complete":
            assert soak_kill.run(["extract", *job, "--out", cache], log) == 1, "a cache with holes is not complete"
            assert f"dflash-cache repair {cache}" in log.read_text()
        assert soak_kill.run(["repair", cache], log) == 1
        assert soak_kill.run(["extract", *job, "--out", cache], log) == 0, log.read_text()
        after = contents(cache)
        assert {name: data for name, data in after.items() if not name.startswith(QUARANTINE_NAME)} == whole
        assert set(bad.values()) <= set(after.values()), "what was damaged is kept"
