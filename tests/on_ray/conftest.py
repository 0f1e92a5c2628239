"""A real Ray cluster on this machine, and a job long enough for a node to die in the midst of it."""

from __future__ import annotations

from pathlib import Path

import commands
import pytest
from clusters import with_code

SLOW = """
import os, time
from transformers import Qwen3ForCausalLM

class Slow(Qwen3ForCausalLM):
    def forward(self, *arguments, **named):
        time.sleep(float(os.environ.get("SECONDS_A_PASS", 0)))
        return super().forward(*arguments, **named)
"""
"""A target that leaves the processor to others."""


@pytest.fixture(scope="package")
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


@pytest.fixture(scope="package")
def long_job(job, once) -> list[str]:
    """Some forty shards, of a pass or two each."""
    slow = ["--target", str(once("slow", lambda path: with_code(job, path, SLOW, "Slow"))), "--trust-remote-code"]
    return [*job, *slow, "--shard-size", "512KiB", "--batch-tokens", "512"]


@pytest.fixture(scope="package")
def uninterrupted(one_thread, long_job, once) -> Path:
    return once("uninterrupted", lambda out: commands.made("extract", *long_job, "--out", out))
