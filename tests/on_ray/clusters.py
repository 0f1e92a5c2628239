"""Clusters of several nodes on this machine, and jobs on them."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import commands

NODE = {"num_cpus": 1, "object_store_memory": 100 << 20}


@contextmanager
def new_cluster() -> Iterator[Any]:
    """Its first node has no room for actors; tests add nodes with room for one each."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": 0, "include_dashboard": False})
    yield cluster
    cluster.shutdown()


def with_code(job: list[str], folder: Path, code: str, model: str) -> None:
    """The job's target once more in ``folder``, with a model of its own ``code``."""
    shutil.copytree(job[job.index("--target") + 1], folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": f"its_code.{model}"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "its_code.py").write_text(code)


def start(
    job: list[str], out: Path | str, cluster, *options: str, before: Callable[[], None] | None = None
) -> commands.Command:
    arguments = [*job, "--out", str(out), "--engine", "ray", "--address", cluster.address, *options]
    return commands.start("extract", *arguments, before=before)


def wait_for_shards(process: commands.Command, out: Path, count: int) -> None:
    while len(list((out / "shards").glob("shard-*"))) < count:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
