"""Several workers on one job: the same bytes as one, whoever dies and however many come back."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import commands
import pytest
import torch
from commands import workers_by_fork
from jobs import contents
from transformers import AutoModelForCausalLM

from cache_format import InputError
from cache_format.layout.captures import Captures
from cache_format.storage.lock import writing
from extractor.config import parse_batch_tokens
from extractor.engine import local
from extractor.engine.local import parse_devices
from extractor.job.worker import Worker
from extractor.target.batch_budget import MOST_BATCH_TOKENS, largest_fitting, run_once
from extractor.target.hooks import HFDFlashTargetModel
from extractor.target.transformers_backend import UNMASKED, TransformersBackend


def test_two_devices_give_the_bytes_of_one(job, made, tmp_path):
    code, out, errors = commands.run("extract", *job, "--out", tmp_path / "cache", "--devices", "cpu,cpu", "--json")
    assert code == 0, errors
    assert contents(tmp_path / "cache") == contents(made)
    report = json.loads(out)
    assert report["complete"]
    assert report["run"]["shards"] == report["shards"]
    assert report["run"]["tokens"] == report["tokens"]


def test_workers_of_torchrun_and_a_rerun_with_another_number_of_them(job, made, tmp_path):
    """Two of three workers come; then a job of two finishes what the third did not do."""
    out = tmp_path / "cache"

    def start(rank: int, world_size: int, name: str) -> commands.Command:
        environment = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": name}
        return commands.start("extract", *job, "--out", out, **environment)

    first = [start(rank, 3, "one") for rank in (1, 0)]
    for process in first:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert "has done its share" in errors
    some = len(list((out / "shards").iterdir()))
    assert 0 < some < len(list((made / "shards").iterdir()))
    second = [start(rank, 2, "two") for rank in (0, 1)]
    ends = [process.communicate(timeout=120)[1] for process in second]
    assert [process.returncode for process in second] == [0, 0], ends
    assert contents(out) == contents(made)


def test_a_killed_worker_costs_its_share_only(job, made, tmp_path):
    out = tmp_path / "cache"
    process = commands.start("extract", *job, "--out", out, "--devices", "cpu,cpu", before=workers_by_fork)
    deadline = time.monotonic() + 60
    victim = None
    while victim is None and time.monotonic() < deadline:
        victim = next(iter(children(process.pid)), None)
        time.sleep(0.05)
    assert victim is not None
    os.kill(victim, signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "died" in errors
    assert "run the same command again" in errors
    assert "Traceback" not in errors
    code, _, errors = commands.run("extract", *job, "--out", out, "--devices", "cpu,cpu", before=workers_by_fork)
    assert code == 0, errors
    assert contents(out) == contents(made)


def test_stopping_the_command_stops_its_workers(job, made, tmp_path):
    out = tmp_path / "cache"
    process = commands.start("extract", *job, "--out", out, "--devices", "cpu,cpu")
    deadline = time.monotonic() + 60
    while len(children(process.pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = children(process.pid)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 143
    assert "To go on:" in errors
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    with writing(out) if out.exists() else pytest.MonkeyPatch.context():
        pass


def test_bad_input_is_said_once_and_stops_all(job, tmp_path):
    data = tmp_path / "bad.jsonl"
    data.write_text('{"messages": 3}\n')
    arguments = [str(data) if text.endswith("train.jsonl") else text for text in job]
    arguments += ["--out", str(tmp_path / "cache"), "--devices", "cpu,cpu"]
    code, _, errors = commands.run("extract", *arguments)
    assert code == 2
    assert errors.count("bad.jsonl") == 1
    assert "Traceback" not in errors


def children(pid: int) -> list[int]:
    """Worker processes of ``pid``, forked or started anew; not Python's resource tracker."""
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        command = Path(f"/proc/{child}/cmdline").read_bytes() if Path(f"/proc/{child}").exists() else b""
        if command and b"resource_tracker" not in command:
            found.append(int(child))
    return found


def test_who_this_worker_is():
    assert Worker.from_environment({}) == Worker()
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "a", "MASTER_PORT": "9"}
    worker = Worker.from_environment(torchrun)
    assert (worker.rank, worker.world_size, worker.local_rank) == (5, 8, 1)
    assert worker.job == Worker.from_environment({**torchrun, "RANK": "0"}).job
    assert worker.job != Worker.from_environment({**torchrun, "MASTER_PORT": "10"}).job
    srun = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
    assert Worker.from_environment(srun) == Worker(rank=3, world_size=4, local_rank=1, job="slurm 7")
    assert Worker.from_environment({name: srun[name] for name in srun if name != "SLURM_STEP_ID"}) == Worker()
    array = {
        "SLURM_ARRAY_JOB_ID": "9",
        "SLURM_JOB_ID": "11",
        "SLURM_ARRAY_TASK_ID": "14",
        "SLURM_ARRAY_TASK_MIN": "10",
        "SLURM_ARRAY_TASK_STEP": "2",
        "SLURM_ARRAY_TASK_COUNT": "3",
    }
    assert Worker.from_environment(array) == Worker(rank=2, world_size=3, job="slurm 9")
    both = {**array, "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_PROCID": "1"}
    assert Worker.from_environment(both) == Worker(rank=5, world_size=6, job="slurm 9")
    for wrong in ({"WORLD_SIZE": "2", "RANK": "2"}, {"WORLD_SIZE": "two"}):
        with pytest.raises(InputError, match=r"RANK|WORLD_SIZE"):
            Worker.from_environment(wrong)


def test_every_shard_has_one_worker():
    shares = [Worker(rank=rank, world_size=3).share(range(10)) for rank in range(3)]
    assert sorted(number for share in shares for number in share) == list(range(10))


def test_devices_by_name(monkeypatch):
    assert parse_devices("cuda:0, cuda:2") == ["cuda:0", "cuda:2"]
    monkeypatch.setattr(local, "accelerators", lambda: [torch.device("cuda", number) for number in range(2)])
    assert parse_devices("all") == ["cuda:0", "cuda:1"]
    monkeypatch.setattr(local, "accelerators", list)
    for wrong in ("all", "cpu,,cpu"):
        with pytest.raises(InputError, match="--devices"):
            parse_devices(wrong)


@pytest.mark.parametrize(("limit", "expected"), [(40_000, 32_768), (8192, 8192), (5000, 4096), (10, 256)])
def test_the_largest_budget_that_fits(limit, expected):
    tried = []
    assert largest_fitting(lambda tokens: tried.append(tokens) or tokens <= limit, most=10**9) == expected
    assert len(tried) < 12


def test_a_budget_is_no_larger_than_the_data():
    assert largest_fitting(lambda tokens: True, most=20_000) == 16_384
    assert largest_fitting(lambda tokens: True, most=10**9) == MOST_BATCH_TOKENS
    assert parse_batch_tokens("auto") is None
    with pytest.raises(InputError, match="--batch-tokens"):
        parse_batch_tokens("many")


def test_what_is_tried_for_auto_is_what_a_run_needs(tiny_target):
    """Captures included: with logits, a pass takes several times the memory."""
    model = AutoModelForCausalLM.from_pretrained(tiny_target, dtype=torch.float32)
    for captures in (Captures(), Captures(last_hidden_states=True, logits_topk=4)):
        extractor = TransformersBackend(HFDFlashTargetModel(model, [0, 2]), UNMASKED, captures)
        heads = []
        with model.lm_head.register_forward_hook(lambda *_, heads=heads: heads.append(1)):
            run_once(extractor, 2, 16, torch.device("cpu"))
        assert bool(heads) == bool(captures.logits_topk)
