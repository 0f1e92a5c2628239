"""SIGTERM and SIGINT (Slurm preemption, Ctrl-C): gone in time, with a code that says so, nothing finished lost."""

from __future__ import annotations

import os
import shlex
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import commands
import pytest
from jobs import contents, on

from cache_format import FeatureCache
from cache_format.layout.samples import read_part
from cache_format.upkeep.verify import verify
from extractor.job.run_shards import NUM_BUFFERS

SIGNALS = [signal.SIGTERM, signal.SIGINT]


def hanging_disk() -> None:
    """Every fsync of a writer thread takes a minute, and says so."""
    fsync = os.fsync

    def hanging(descriptor: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            print("hanging", flush=True)
            time.sleep(60)
        fsync(descriptor)

    os.fsync = hanging


@pytest.fixture(scope="module")
def long_job(job) -> list[str]:
    """Some forty shards."""
    return [*job, "--shard-size", "512KiB", "--batch-tokens", "512"]


@pytest.fixture(scope="module")
def uninterrupted(long_job, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("signals") / "cache"
    commands.made("extract", *long_job, "--out", out)
    return out


def start(job: list[str], out: Path, before: Callable[[], None] | None = None) -> commands.Command:
    return commands.start("extract", *job, "--out", out, before=before)


def wait_for(process: commands.Command, folder: Path, pattern: str, count: int) -> None:
    """Until ``folder`` holds that many such files."""
    while len(list(folder.glob(pattern))) < count:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)


def stop(process: commands.Command, number: signal.Signals, job: list[str], out: Path) -> float:
    """Send the signal and check the code and the last words; seconds until the process was gone."""
    began = time.monotonic()
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    seconds = time.monotonic() - began
    assert process.returncode == 128 + number
    # Python's own process that counts shared memory may have a last word of its own once this one is gone.
    lines = [line for line in errors.splitlines() if "resource_tracker" not in line]
    assert lines[-1].endswith(shlex.join(["dflash-cache", "extract", *job, "--out", str(out)]))
    assert f"stopped by {number.name}" in errors
    assert "Traceback" not in errors
    return seconds


@pytest.mark.parametrize("number", SIGNALS)
def test_stopped_in_mid_extraction_and_resumed(number, long_job, uninterrupted, tmp_path):
    out, whole = tmp_path / "cache", contents(uninterrupted)
    process = start(long_job, out)
    wait_for(process, out / "shards", "shard-*", 3)
    assert stop(process, number, long_job, out) < 10
    left = contents(out)
    shards = [name for name in left if name.startswith("shards/")]
    assert 3 <= len(shards) < len(list((uninterrupted / "shards").iterdir()))
    for name in left:
        if name != "manifest.json":
            assert left[name] == whole[name], "finished files are whole; no lock and no half-written file is left"
    cache = FeatureCache.open(out, allow_incomplete=True)
    assert sum(cache[i].input_ids.shape[1] for i in range(len(cache))) > 0
    kept = {name: (out / name).stat().st_mtime_ns for name in shards}
    commands.made("extract", *long_job, "--out", out)
    assert contents(out) == whole
    assert {name: (out / name).stat().st_mtime_ns for name in shards} == kept, "finished shards are not made again"


@pytest.mark.parametrize("number", SIGNALS)
def test_a_hanging_disk_is_waited_for_only_so_long(number, long_job, uninterrupted, tmp_path):
    out = tmp_path / "cache"
    process = start(long_job, out, hanging_disk)
    # Both of the writer threads: one that is being started has nothing in hand yet.
    commands.wait_for(lambda: process.stdout.read_text().count("hanging\n") == NUM_BUFFERS - 1)
    if number == signal.SIGINT:
        process.send_signal(number)
        time.sleep(0.5)
        assert process.poll() is None, "the shard in hand is waited for"
    assert stop(process, number, long_job, out) < (10 if number == signal.SIGTERM else 4), (
        "a second Ctrl-C waits for none"
    )
    assert not list((out / "shards").glob("shard-*")), "what was not synced has no name"
    commands.made("extract", *long_job, "--out", out)
    assert contents(out) == contents(uninterrupted)


def small_parts() -> None:
    import extractor.data.prepare as prepare

    prepare.ROWS_PER_PART, prepare.ROWS_WORTH_A_PROCESS = 256, 512


def test_stopped_while_processes_prepare(job, demo_jsonl, tmp_path):
    data, out = tmp_path / "many.jsonl", tmp_path / "cache"
    data.write_text(demo_jsonl.read_text() * 20)
    job = [*on(job, data), "--limit", "6000"]
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core: prepared in the main process")
    process = start(job, out, small_parts)
    wait_for(process, out / "samples", "samples-*.arrow", 1)
    assert process.descendants()
    assert stop(process, signal.SIGTERM, job, out) < 10
    assert not list(out.rglob(".*")), "no lock, nothing half-written"
    for part in (out / "samples").iterdir():
        read_part(part)
    problems = [str(problem) for problem in verify(out).problems]
    assert len(problems) == 1
    assert "preparing" in problems[0]
    assert not process.descendants(), "no process of it is left"
