"""Workers of a job prepare the samples together: the same bytes as one, whoever comes, dies or is slow."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import commands
import pytest
from commands import wait_for
from jobs import contents, on
from s3 import objects
from transformers import AutoTokenizer

from cache_format.layout.manifest import Manifest
from cache_format.layout.samples import part_path
from cache_format.storage.store import Store
from extractor.config import DataOptions, PrepareOptions
from extractor.data import prepare as prepare_module
from extractor.data.dataset import open_source
from extractor.data.division import Division
from extractor.data.prepare import prepare

ROWS = 6
"""of the job; a part each"""


def parts_of_a_row() -> None:
    """For ``before``: each part a row, and a line in the file NOTES for each that is made: ``rank number``.

    Worker MEETS goes on with its second part when every other one has made one (or is not to come: ABSENT); worker
    STAYS never comes to an end with its second one.
    """
    rank, notes = os.environ["RANK"], Path(os.environ["NOTES"])
    write, made = prepare_module._write_rows, []

    def noted(how, path, number, rows):
        if made and rank == os.environ.get("MEETS"):
            others = set(map(str, range(int(os.environ["WORLD_SIZE"])))) - {rank, os.environ.get("ABSENT")}
            wait_for(lambda: others <= set(notes.read_text().split()[::2]))
        while made and rank == os.environ.get("STAYS"):
            time.sleep(0.1)
        made.append(number)
        result = write(how, path, number, rows)
        with open(notes, "a") as file:
            file.write(f"{rank} {number}\n")
        return result

    prepare_module.ROWS_PER_PART, prepare_module._write_rows = 1, noted


def start(job: list[str], out: Path | str, rank: int, world_size: int, notes: Path, **environment: str):
    notes.touch()
    numbers = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": notes.name}
    everything = {**numbers, "NOTES": str(notes), **environment}
    return commands.start(*job, "--out", out, before=parts_of_a_row, **everything)


def ended(*processes, code: int = 0) -> list[str]:
    ends = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [code] * len(processes), ends
    assert "Traceback" not in "".join(ends)
    return ends


def made_by(notes: Path) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for line in notes.read_text().splitlines():
        rank, number = line.split()
        found.setdefault(rank, []).append(int(number))
    return found


@pytest.fixture(scope="module")
def alone(small_job, tmp_path_factory) -> Path:
    """The cache of the job, made by one worker."""
    out, notes = tmp_path_factory.mktemp("alone") / "cache", tmp_path_factory.mktemp("notes") / "alone"
    ended(start(small_job, out, 0, 1, notes))
    assert made_by(notes) == {"0": list(range(ROWS))}
    return out


@pytest.mark.parametrize("world_size", [2, 3])
def test_workers_share_the_parts_and_write_the_bytes_of_one(small_job, alone, world_size, tmp_path):
    out, notes = tmp_path / "cache", tmp_path / "notes"
    ended(*[start(small_job, out, rank, world_size, notes, MEETS="0") for rank in range(world_size)])
    by = made_by(notes)
    assert sorted(by) == [str(rank) for rank in range(world_size)], "everyone makes some"
    assert by["0"][0] == 0
    assert sorted({number for numbers in by.values() for number in numbers}) == list(range(ROWS))
    assert contents(out) == contents(alone)


def test_a_worker_that_is_killed_while_it_prepares_stops_nobody(small_job, alone, tmp_path):
    out, notes = tmp_path / "cache", tmp_path / "notes"
    workers = [start(small_job, out, rank, 3, notes, MEETS="0", STAYS="2") for rank in range(3)]
    wait_for(lambda: "2" in made_by(notes))
    workers[2].kill()
    ends = ended(*workers[:2])
    assert any("has done its share" in text for text in ends)
    assert sorted({number for numbers in made_by(notes).values() for number in numbers}) == list(range(ROWS))
    ended(start(small_job, out, 0, 1, tmp_path / "again"))
    assert made_by(tmp_path / "again") == {}, "the samples were prepared"
    assert contents(out) == contents(alone)


def test_a_slow_worker_is_not_waited_for(small_job, alone, tmp_path):
    """It goes on when its parts are made, and with its shards."""
    out, notes = tmp_path / "cache", tmp_path / "notes"
    slow = start(small_job, out, 1, 2, notes, STAYS="1")
    leader = start(small_job, out, 0, 2, notes, MEETS="0")
    ended(leader)
    assert made_by(notes) == {"0": [0, 2, 4, 5, 3], "1": [1]}
    slow.kill()
    slow.wait()
    ended(start(small_job, out, 1, 2, tmp_path / "again"))
    assert made_by(tmp_path / "again") == {}
    assert contents(out) == contents(alone)


def test_the_leading_worker_is_killed_and_the_next_run_keeps_what_others_made(small_job, alone, tmp_path):
    out, notes = tmp_path / "cache", tmp_path / "notes"
    workers = [start(small_job, out, rank, 2, notes, STAYS="0") for rank in range(2)]
    wait_for(lambda: sorted(made_by(notes).get("1", [])) == [1, 3, 5] and "0" in made_by(notes))
    kept = {number: part_path(out / "samples", number).stat().st_ino for number in (0, 1, 3, 5)}
    workers[0].kill()
    workers[1].send_signal(signal.SIGTERM)
    assert workers[1].wait() == 143
    ended(start(small_job, out, 0, 1, tmp_path / "again"))
    assert made_by(tmp_path / "again") == {"0": [2, 4]}
    assert {number: part_path(out / "samples", number).stat().st_ino for number in kept} == kept
    assert contents(out) == contents(alone)


def test_a_bad_row_is_said_by_the_leading_worker_and_ends_all(small_job, tmp_path):
    data, out, notes = tmp_path / "bad.jsonl", tmp_path / "cache", tmp_path / "notes"
    rows = Path(small_job[small_job.index("--data") + 1]).read_text().splitlines(keepends=True)
    data.write_text("".join([*rows[:3], '{"messages": 3}\n', *rows[4:]]))
    ends = ended(*[start(on(small_job, data), out, rank, 2, notes, MEETS="0") for rank in range(2)], code=2)
    assert "bad.jsonl row 4: " in ends[0]
    assert "worker 1 stops, since worker 0 could not prepare the samples" in ends[1]
    assert not (out / "manifest.json").exists()
    ended(start(small_job, out, 0, 1, tmp_path / "again"))
    assert Manifest.read(out).state == "complete", "mended rows may go to the same place"


@pytest.mark.slow
def test_at_a_url_workers_find_each_others_parts(s3, bucket, small_job, alone, tmp_path):
    notes = tmp_path / "notes"
    workers = [
        start([*small_job, "--scratch", str(tmp_path / f"scratch-{rank}")], bucket, rank, 2, notes, MEETS="0")
        for rank in range(2)
    ]
    ended(*workers)
    by = made_by(notes)
    assert sorted(by) == ["0", "1"]
    assert objects(s3, bucket) == contents(alone)


@pytest.mark.slow
def test_at_a_url_another_host_goes_on_with_the_parts_that_are_there(s3, bucket, small_job, alone, tmp_path):
    notes, again = tmp_path / "notes", tmp_path / "again"
    leader = start([*small_job, "--scratch", str(tmp_path / "one")], bucket, 0, 2, notes, STAYS="0")
    helper = start([*small_job, "--scratch", str(tmp_path / "two")], bucket, 1, 2, notes)
    wait_for(lambda: sorted(made_by(notes).get("1", [])) == [1, 3, 5] and "0" in made_by(notes))
    wait_for(lambda: Store(bucket).size("samples/samples-00005.arrow"))
    for process in (leader, helper):
        process.kill()
        process.wait()
    # Damage that the store does not tell of is found by whoever takes the part.
    Store(bucket).put("samples/samples-00005.arrow", b"not a part")
    ended(start([*small_job, "--scratch", str(tmp_path / "three")], bucket, 0, 1, again))
    assert made_by(again) == {"0": [2, 4, 5]}
    assert objects(s3, bucket) == contents(alone)


# -- in this process --------------------------------------------------------------------------------------------------


def test_every_part_has_a_worker_and_the_leading_one_has_all():
    for world_size in (1, 2, 5):
        orders = [Division(rank=rank, world_size=world_size).order(11) for rank in range(world_size)]
        assert sorted(orders[0]) == list(range(11))
        firsts = [number for rank, order in enumerate(orders) for number in order if number % world_size == rank]
        assert sorted(firsts) == list(range(11))
    assert Division().order(4) == [0, 1, 2, 3]
    assert Division(rank=0, world_size=3).order(7) == [0, 3, 6, 5, 4, 2, 1]
    assert Division(rank=2, world_size=3).order(7) == [2, 5]


def test_workers_of_one_machine_divide_its_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert Division().processes(10**9, 1000) == 16
    assert Division(world_size=64, local_size=8).processes(10**9, 1000) == 2
    assert Division(world_size=64, local_size=64).processes(10**9, 1000) == 1
    assert Division(world_size=2).processes(8000, 1000) == 4
    assert Division().processes(999, 1000) == 1
    assert Division().processes(None, 1000) == 16


def test_what_was_made_for_something_else_or_damaged_is_made_anew_by_whoever_has_it(
    demo_jsonl, tiny_target, tmp_path, monkeypatch
):
    monkeypatch.setattr(prepare_module, "ROWS_PER_PART", 64)
    tokenizer = AutoTokenizer.from_pretrained(tiny_target)

    def run(folder: Path, made_for: str = "this", **division) -> list[int]:
        made: list[int] = []
        options = PrepareOptions(max_length=100)
        source = open_source(DataOptions(name=str(demo_jsonl)), 300)
        prepare(source, tokenizer, options, folder, made_for=made_for, division=Division(made=made.append, **division))
        return made

    assert run(tmp_path / "alone") == [0, 1, 2, 3, 4]
    run(tmp_path / "both", "another")
    flipped = bytearray(part_path(tmp_path / "alone", 3).read_bytes())
    flipped[len(flipped) // 2] ^= 1
    part_path(tmp_path / "both", 3).write_bytes(flipped)
    assert run(tmp_path / "both", rank=1, world_size=2) == [1, 3]
    assert run(tmp_path / "both", rank=0, world_size=2) == [0, 2, 4]
    assert contents(tmp_path / "both") == contents(tmp_path / "alone")
    assert run(tmp_path / "both", rank=1, world_size=2, wanted=lambda: False) == []


@pytest.mark.slow
def test_a_worker_of_a_device_prepares_in_processes_of_its_own(small_job, tiny_target, tmp_path):
    """Of 36,000 rows two processes make parts; a weight leaves few to extract."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core: prepared in the worker itself")
    data, out = tmp_path / "many.jsonl", tmp_path / "cache"
    with open(data, "w") as file:
        for number in range(36_000):
            file.write(json.dumps({"input_ids": [5, 6, number % 999], "loss_mask": [0, 1, 1]}) + "\n")
    arguments = on(small_job[: small_job.index("--limit")], f"{data}:0.001")
    process = commands.start(*arguments, "--out", out, "--devices", "cpu")
    # The worker, and two that it has.
    assert wait_for(lambda: len(process.descendants()) >= 3, 120)
    ended(process)
    assert Manifest.read(out).data.rows == 36_000
