"""A real Ray cluster on this machine: the same bytes as one process, whatever is stopped, dies or cannot be."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import commands
import pytest
from clusters import NODE, new_cluster, start, wait_for_shards, with_code
from jobs import contents

from cache_format import InputError
from cache_format.layout.shard_layout import shard_name
from cache_format.storage.store import Store
from extractor.data import prepare
from extractor.engine import ray as ray_engine
from extractor.engine.ray_worker import ShardWorker
from extractor.engine.shard_queue import MAX_TRIES, ShardQueue, WorkerError
from extractor.job.job import opened
from extractor.job.worker import Worker

ray = pytest.importorskip("ray", reason="needs pip install 'dflash-cache[ray]'")


@pytest.fixture(scope="module")
def quiet_cluster(one_thread):
    """Of tests that kill no node: one has room for an actor."""
    with new_cluster() as cluster:
        cluster.add_node(**NODE)
        yield cluster


def worker_of(job: list[str], tmp_path: Path, **where: object) -> ShardWorker:
    """An actor's object, in this process."""
    from extractor.cli.extract_options import extract_options

    pairs = zip(job[::2], job[1::2], strict=True)
    arguments = {name.removeprefix("--").replace("-", "_"): value for name, value in pairs}
    arguments |= {**where, "capture": [], "data": [arguments["data"]]}
    for name in ("max_length", "limit"):
        arguments[name] = int(arguments[name])
    return ShardWorker(extract_options(arguments), Worker(job="one", world_size=2), str(tmp_path), {}, True)


def test_a_node_that_sees_another_store_begins_no_cache(bucket, job, tmp_path):
    worker = worker_of(job, tmp_path, out=bucket, scratch=tmp_path / "scratch")
    with pytest.raises(InputError, match="does not see what the driver has put there"):
        worker.open()
    worker.close()
    assert Store(bucket).list() == {}
    assert not [path for path in (tmp_path / "scratch").rglob("*") if path.is_file()]


def test_a_worker_that_does_not_plan_prepares_its_share_of_the_samples(job, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "ROWS_PER_PART", 20)
    worker = worker_of(job, tmp_path, out=tmp_path / "cache", scratch=None)
    with opened(worker._options, Worker(job="one")) as planning:
        planning.begun()
        worker.help(1)
        parts = sorted(int(path.stem.removeprefix("samples-")) for path in (tmp_path / "cache/samples").iterdir())
        assert parts
        assert parts == list(range(1, 2 * len(parts), 2))
        planning.run()
    manifest = (tmp_path / "cache/manifest.json").read_bytes()
    worker.help(1)
    assert (tmp_path / "cache/manifest.json").read_bytes() == manifest, "nobody wants it any more"
    worker.close()


def test_a_node_that_sees_another_folder_begins_no_cache(job, tmp_path):
    """A path that is not shared, or a mount that is not there."""
    worker = worker_of(job, tmp_path, out=tmp_path / "not-shared")
    with pytest.raises(InputError, match="is it a folder that all nodes share"):
        worker.open()
    worker.close()
    assert not (tmp_path / "not-shared").exists()


@pytest.mark.slow
def test_verify_by_the_workers_of_a_cluster(quiet_cluster, made, tmp_path):
    """One report of all of them; a worker that dies gives its shards to another."""
    cache = Path(shutil.copytree(made, tmp_path / "cache"))
    path = cache / shard_name(3)
    path.write_bytes(path.read_bytes()[:-20] + b"x" * 20)
    quiet_cluster.add_node(**NODE)
    of_ray = ["--engine", "ray", "--address", quiet_cluster.address, "--json"]
    process = commands.start("verify", cache, *of_ray, before=first_worker_dies)
    output, errors = process.communicate(timeout=120)
    report = json.loads(output)
    assert process.returncode == 1, errors
    assert "a worker is gone" in errors
    assert {problem["shard"] for problem in report["problems"]} == {3}
    assert report["shards"] == report["of_shards"]
    assert report["bytes_read"] == sum(path.stat().st_size for path in (made / "shards").iterdir())


def first_worker_dies() -> None:
    """In the driver's process: the first worker is killed as soon as it has shards in hand."""
    from extractor.engine import ray_verify

    hand_out, killed = ray_verify._Fleet._hand_out, []

    def then_kill(fleet: Any, actor: Any) -> None:
        hand_out(fleet, actor)
        if not killed:
            killed.append(actor)
            fleet._ray.kill(actor)

    ray_verify._Fleet._hand_out = then_kill


@pytest.mark.slow
def test_stopped_and_gone_on_with(quiet_cluster, long_job, uninterrupted, tmp_path):
    out = tmp_path / "cache"
    process = start(long_job, out, quiet_cluster)
    wait_for_shards(process, out, 3)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, time.monotonic() - began < 10) == (143, True)
    assert "To go on:" in errors
    assert "Traceback" not in errors
    kept = {path: path.stat().st_mtime_ns for path in (out / "shards").glob("shard-*")}
    assert 3 <= len(kept) < len(list((uninterrupted / "shards").iterdir()))
    again = start(long_job, out, quiet_cluster)
    _, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert contents(out) == contents(uninterrupted)


@pytest.mark.slow
def test_what_no_other_worker_could_mend_stops_the_job(quiet_cluster, job, tmp_path):
    """A target that gives NaN: the first actor's error is the command's, with its exit code."""
    from safetensors.torch import load_file, save_file

    target = Path(job[job.index("--target") + 1])
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in target.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    process = start([*job, "--target", str(broken)], tmp_path / "cache", quiet_cluster)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "NaN or Inf" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "cache" / ".lock").exists()


def two_deaths_are_enough() -> None:
    """In the driver's process; each takes an actor's start, of many seconds."""
    ray_engine.BARREN_DEATHS = 2


@pytest.mark.slow
def test_actors_that_die_one_after_the_other_stop_the_job(quiet_cluster, job, tmp_path):
    """A target whose own code ends the process: no worker of any node will ever finish a shard."""
    with_code(job, tmp_path / "deadly", "import os\nos._exit(9)\nclass Model: ...\n", "Model")
    deadly = [*job, "--target", str(tmp_path / "deadly"), "--trust-remote-code"]
    process = start(deadly, tmp_path / "cache", quiet_cluster, "--num-workers", "1", before=two_deaths_are_enough)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 1, errors
    assert "2 workers died one after the other" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "cache" / ".lock").exists()


def test_shards_that_are_lost_come_next_and_not_for_ever():
    queue = ShardQueue([4, 5, 6])
    assert [queue.take(), queue.take()] == [4, 5]
    queue.lost(4, "no reason")
    assert queue.take() == 4
    for number in (4, 5):
        queue.made(number)
    assert queue
    for _ in range(MAX_TRIES - 1):
        assert queue.take() == 6
        assert queue.take() is None
        queue.lost(6, "killed")
    queue.take()
    with pytest.raises(WorkerError, match=r"shard 6 was begun 3 times.*killed"):
        queue.lost(6, "killed")


def test_ray_options_that_cannot_be(job, cli, tmp_path, monkeypatch):
    for wrong, message in (
        (["--num-workers", "2"], "--engine ray"),
        (["--engine", "slurm"], "'slurm' is not one of"),
        (["--engine", "ray", "--devices", "cpu,cpu"], "--devices"),
        (["--engine", "ray", "--tp-plan", "auto"], "--tp-plan"),
        (["--engine", "ray", "--address", "ray://head:10001"], "--address auto"),
        (["--engine", "ray", "--address", "127.0.0.1:1"], "no Ray cluster"),
    ):
        code, _, errors = cli("extract", *job, "--out", tmp_path / "cache", *wrong)
        assert (code, message in errors) == (2, True), errors
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, errors = cli("extract", *job, "--out", tmp_path / "cache", "--engine", "ray")
    assert code == 2
    assert "pip install 'dflash-cache[ray]'" in errors
