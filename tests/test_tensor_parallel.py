"""A target divided over several processes or devices gives the states of the whole one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cache_format import FeatureCache, InputError
from extractor.config import TargetOptions

CAPTURES = ["--capture", "last_hidden_states", "--capture", "logits-topk=3"]


def torchrun(processes: int, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    command += ["-m", "extractor", "extract", *arguments, "--tp-plan", "auto"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=240, env=environment)


def assert_same_states(one: Path, other: Path | str) -> None:
    a, b = FeatureCache.open(one), FeatureCache.open(other)
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x.input_ids, y.input_ids)
        assert torch.equal(x.loss_mask, y.loss_mask)
        assert (x.hidden_states - y.hidden_states).norm() < 1e-5 * x.hidden_states.norm()
        if x.last_hidden_states is not None:
            assert torch.allclose(x.last_hidden_states, y.last_hidden_states, atol=1e-4)
            assert torch.allclose(x.logits_topk_values, y.logits_topk_values, atol=1e-4)
            assert torch.allclose(x.logits_logsumexp, y.logits_logsumexp, atol=1e-4)
    for kind in ("get_input_embeddings", "get_output_embeddings"):
        assert torch.equal(getattr(a, kind)().weight, getattr(b, kind)().weight)


@pytest.mark.slow
def test_two_processes_share_a_target(job, cli, tmp_path):
    """The states of one device within rounding, captures too; resumed; never mixed with those of another division."""
    job = [*job, "--limit", "40", *CAPTURES, "--batch-tokens", "1024"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert cli("extract", *job, "--out", one)[0] == 0
    run = torchrun(2, *job, "--out", two)
    assert run.returncode == 0, run.stderr
    assert_same_states(one, two)
    whole = {path.name: path.read_bytes() for path in (two / "shards").iterdir()}
    code, _, errors = cli("extract", *job, "--out", two)
    assert (code, "tp_size: cache has 2" in errors) == (2, True)
    shard = sorted((two / "shards").iterdir())[-1]
    shard.unlink()
    cli("repair", two)
    run = torchrun(2, *job, "--out", two)
    assert run.returncode == 0, run.stderr
    assert {path.name: path.read_bytes() for path in (two / "shards").iterdir()} == whole


@pytest.mark.slow
def test_two_processes_share_a_target_whose_cache_goes_to_a_url(job, bucket, cli, tmp_path):
    job = [*job, "--limit", "10"]
    assert cli("extract", *job, "--out", tmp_path / "one")[0] == 0
    run = torchrun(2, *job, "--out", bucket, "--scratch", tmp_path / "scratch")
    assert run.returncode == 0, run.stderr
    assert_same_states(tmp_path / "one", bucket)


@pytest.mark.slow
def test_a_target_that_cannot_be_divided_so_is_refused_and_nothing_hangs(job, tmp_path):
    run = torchrun(3, *job, "--out", tmp_path / "cache")
    assert run.returncode != 0
    assert "3 processes do not divide" in run.stderr
    assert not (tmp_path / "cache").exists()


def test_without_torchrun_it_is_said_how_to_start_it(job, cli, tmp_path):
    code, _, errors = cli("extract", *job, "--out", tmp_path / "cache", "--tp-plan", "auto")
    assert (code, "torchrun --nproc-per-node" in errors) == (2, True)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tp-plan", "colwise"], "'colwise' is not one of"),
        (["--tp-plan", "auto", "--device-map", "auto"], "give one of them"),
        (["--tp-plan", "auto", "--batch-tokens", "auto"], "give a number"),
        (["--tp-plan", "auto", "--devices", "cpu,cpu"], "give one"),
    ],
)
def test_options_that_exclude_each_other(job, cli, tmp_path, options, message):
    code, _, errors = cli("extract", *job, "--out", tmp_path / "cache", *options)
    assert (code, message in errors) == (2, True), errors
    assert not (tmp_path / "cache").exists()


def test_one_way_to_divide_a_target():
    with pytest.raises(InputError, match="both divide"):
        TargetOptions(name="t", tp_plan="auto", device_map="auto")


def test_device_map(job, made, cli, tmp_path):
    """Here all of it ends up on the CPU; the same bytes."""
    if not shutil.which("accelerate", path=str(Path(sys.executable).parent)):
        pytest.skip("needs accelerate")
    assert cli("extract", *job, "--out", tmp_path / "cache", "--device-map", "auto")[0] == 0
    assert_same_states(made, tmp_path / "cache")
