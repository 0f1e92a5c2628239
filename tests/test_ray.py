"""A real Ray cluster of several nodes on this machine: the same bytes as one process, whatever dies or comes late."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import commands
import pytest
from jobs import contents
from s3 import objects

from cache_format import InputError
from cache_format.layout.shard_layout import shard_name
from cache_format.storage.store import Store
from extractor.data import prepare
from extractor.engine.ray import BARREN_DEATHS
from extractor.engine.ray_worker import ShardWorker
from extractor.engine.shard_queue import MAX_TRIES, ShardQueue, WorkerError
from extractor.job.job import opened
from extractor.job.worker import Worker

ray = pytest.importorskip("ray", reason="needs pip install 'dflash-cache[ray]'")

NODE = {"num_cpus": 1, "object_store_memory": 100 << 20}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As Ray gives an actor of one CPU; more would only wait for each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        # Idle processes that Ray would start ahead, and its reports of itself.
        patch.setenv("RAY_prestart_worker_first_driver", "0")
        patch.setenv("RAY_enable_worker_prestart", "0")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # Every half second a node is asked whether it lives, and is dead after five times.
        patch.setenv("RAY_health_check_initial_delay_ms", "1000")
        patch.setenv("RAY_health_check_period_ms", "500")
        yield


@contextmanager
def new_cluster() -> Iterator[Any]:
    """Its first node has no room for actors; tests add nodes with room for one each."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": 0, "include_dashboard": False})
    yield cluster
    cluster.shutdown()


@pytest.fixture
def cluster(one_thread, uninterrupted, monkeypatch):
    """Of a test that kills nodes."""
    monkeypatch.setenv("SECONDS_A_PASS", "0.5")
    with new_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def quiet_cluster(one_thread):
    """Of tests that kill no node: one has room for an actor."""
    with new_cluster() as cluster:
        cluster.add_node(**NODE)
        yield cluster


SLOW = """
import os, time
from transformers import Qwen3ForCausalLM

class Slow(Qwen3ForCausalLM):
    def forward(self, *arguments, **named):
        time.sleep(float(os.environ.get("SECONDS_A_PASS", 0)))
        return super().forward(*arguments, **named)
"""
"""A target that leaves the processor to others, and a job long enough for a node to die in the midst of it."""


@pytest.fixture(scope="module")
def long_job(job, tmp_path_factory) -> list[str]:
    """Some forty shards, of a pass or two each."""
    target = Path(shutil.copytree(job[job.index("--target") + 1], tmp_path_factory.mktemp("slow") / "target"))
    config = json.loads((target / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "slow.Slow"}
    (target / "config.json").write_text(json.dumps(config))
    (target / "slow.py").write_text(SLOW)
    slow = ["--target", str(target), "--trust-remote-code"]
    return [*job, *slow, "--shard-size", "512KiB", "--batch-tokens", "512"]


@pytest.fixture(scope="module")
def uninterrupted(one_thread, long_job, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("ray") / "cache"
    commands.made("extract", *long_job, "--out", out)
    return out


def start(job: list[str], out: Path | str, cluster, *options: str) -> commands.Command:
    arguments = [*job, "--out", str(out), "--engine", "ray", "--address", cluster.address, *options]
    return commands.start("extract", *arguments)


def wait_for_shards(process: commands.Command, out: Path, count: int) -> None:
    while len(list((out / "shards").glob("shard-*"))) < count:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)


@pytest.mark.slow
def test_a_node_that_dies_costs_its_shards_only_and_a_new_one_takes_its_place(
    cluster, long_job, uninterrupted, tmp_path
):
    out = tmp_path / "cache"
    victim, _ = cluster.add_node(**NODE), cluster.add_node(**NODE)
    # Three actors are asked for, and there is room for two: the one without a place stops nobody.
    process = start(long_job, out, cluster, "--num-workers", "3", "--json")
    wait_for_shards(process, out, 12)
    kept = {path: path.stat().st_mtime_ns for path in (out / "shards").glob("shard-*")}
    cluster.remove_node(victim, allow_graceful=False)
    cluster.add_node(**NODE)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "a worker is gone" in errors
    assert "Traceback" not in errors
    assert output.count("\n") == 1, output
    report = json.loads(output)
    assert report["complete"]
    assert 0 <= report["shards"] - report["run"]["shards"] <= 2, "no shard is made twice"
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "finished shards are not made again"
    assert contents(out) == contents(uninterrupted)


@pytest.mark.slow
def test_to_a_url_while_a_node_dies(s3, bucket, cluster, long_job, uninterrupted, tmp_path):
    victim, _ = cluster.add_node(**NODE), cluster.add_node(**NODE)
    scratch = tmp_path / "scratch"
    process = start([*long_job, "--scratch", str(scratch)], bucket, cluster, "--num-workers", "2", "--json")
    at_work: set[str] = set()
    while len(at_work) < 2 or not Store(bucket).size(shard_name(3)):
        at_work |= {path.parts[-3] for path in scratch.glob("*/actor-*/shards/*")}
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    cluster.remove_node(victim, allow_graceful=False)
    cluster.add_node(**NODE)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "a worker is gone" in errors
    assert "Traceback" not in errors
    assert objects(s3, bucket) == contents(uninterrupted)
    report = json.loads(output)
    assert report["complete"]
    assert 0 <= report["shards"] - report["run"]["shards"] <= 2, "no shard is made twice"
    assert not [path for path in scratch.rglob("*") if path.is_file()], "nothing is left on the disk"
    again = start([*long_job, "--scratch", str(scratch)], bucket, cluster)
    assert "already complete" in again.communicate(timeout=60)[1]


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
    third = start(long_job, out, quiet_cluster)
    assert "already complete" in third.communicate(timeout=60)[1]


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


@pytest.mark.slow
def test_actors_that_die_one_after_the_other_stop_the_job(quiet_cluster, job, tmp_path):
    """A target whose own code ends the process: no worker of any node will ever finish a shard."""
    target = Path(shutil.copytree(job[job.index("--target") + 1], tmp_path / "deadly"))
    config = json.loads((target / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "deadly.Model"}
    (target / "config.json").write_text(json.dumps(config))
    (target / "deadly.py").write_text("import os\nos._exit(9)\nclass Model: ...\n")
    deadly = [*job, "--target", str(target), "--trust-remote-code"]
    process = start(deadly, tmp_path / "cache", quiet_cluster, "--num-workers", "1")
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 1, errors
    assert f"{BARREN_DEATHS} workers died one after the other" in errors
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
