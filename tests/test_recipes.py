"""scripts/recipes: each trains, and goes on from its last checkpoint with the losses of a run that was not stopped."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import runpy
import socket
import sys
from pathlib import Path

import commands
import pytest

RECIPES = Path(__file__).resolve().parent.parent / "scripts" / "recipes"


def run(name: str, cache: Path, folder: Path, ranks: int) -> None:
    """In a process of its own: 7 steps at once; and 4 steps, then (from the checkpoint after the third) to the 7th."""
    sys.path.insert(0, str(RECIPES))
    main = runpy.run_path(str(RECIPES / f"{name}.py"), run_name="recipe")["main"]
    if ranks > 1:
        from torch import distributed

        distributed.init_process_group("gloo")
    main(str(cache), str(folder / "whole"), "7")
    main(str(cache), str(folder / "stopped"), "4")
    main(str(cache), str(folder / "stopped"), "7")
    os._exit(0)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.parametrize("name", ["torch_loop", "accelerate_loop", "hf_trainer", "fsdp2", "lightning_loop"])
def test_a_recipe_trains_and_resumes_in_mid_epoch(name, made, tmp_path):
    if name == "lightning_loop" and importlib.util.find_spec("lightning") is None:
        pytest.skip("Lightning is not installed")
    ranks = 2 if name == "fsdp2" else 1
    there = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()} if ranks > 1 else {}
    work = functools.partial(run, name, made, tmp_path, ranks)
    started = [commands.start(name, before=work, **{**there, "RANK": str(n)} if there else {}) for n in range(ranks)]
    for process in started:
        assert process.wait() == 0, process.stderr.read_text()[-3000:]
    whole, stopped = (
        [json.loads(line) for line in (tmp_path / run / "losses.jsonl").read_text().splitlines()]
        for run in ("whole", "stopped")
    )
    losses = dict(whole)
    assert list(losses) == list(range(1, 8))
    assert len(set(losses.values())) == 7
    assert {step for step, _ in stopped} == set(losses)
    assert all(loss == losses[step] for step, loss in stopped)
