"""Ray nodes that die in the midst of a job: the bytes of one process, and what was finished stays."""

from __future__ import annotations

import json
import time
from typing import Any

import commands
import pytest
from clusters import NODE, new_cluster, start, wait_for_shards
from jobs import contents
from s3 import objects

from cache_format.layout.shard_layout import shard_name
from cache_format.storage.store import Store

pytest.importorskip("ray", reason="needs pip install 'dflash-cache[ray]'")


@pytest.fixture
def cluster(one_thread, uninterrupted, monkeypatch):
    """Of a test that kills nodes."""
    monkeypatch.setenv("SECONDS_A_PASS", "0.5")
    with new_cluster() as cluster:
        yield cluster


def ended_without(victim: Any, process: commands.Command, cluster: Any) -> None:
    """Node ``victim`` dies and another comes; the job ends well, and says what happened."""
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
    ended_without(victim, process, cluster)
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
    ended_without(victim, process, cluster)
    assert objects(s3, bucket) == contents(uninterrupted)
    assert not [path for path in scratch.rglob("*") if path.is_file()], "nothing is left on the disk"
    again = start([*long_job, "--scratch", str(scratch)], bucket, cluster)
    assert "already complete" in again.communicate(timeout=60)[1]
