"""A target divided over several processes or devices gives the states of the whole one."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import commands
import pytest
import torch
from transformers import Qwen3MoeConfig

from cache_format import FeatureCache, InputError
from extractor.config import TargetOptions
from extractor.target.parallel_plan import parallel_plan

CAPTURES = ["--capture", "last_hidden_states", "--capture", "logits-topk=3"]


def torchrun(processes: int, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    command += ["-m", "extractor", "extract", *arguments, "--tp-plan", "auto"]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=240)


def ranks(count: int, *arguments: object, before: Callable[[], None] | None = None) -> list[commands.Command]:
    """The processes that torchrun would start, without waiting for imports."""
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        commands.start(
            *("extract", *arguments, "--tp-plan", "auto"), before=before, RANK=str(n), LOCAL_RANK=str(n), **shared
        )
        for n in range(count)
    ]


def ends(processes: list[commands.Command]) -> tuple[list[int | None], str]:
    """Exit codes, and what all said to stderr."""
    errors = "".join(process.communicate()[1] for process in processes)
    return [process.returncode for process in processes], errors


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
    codes, errors = ends(ranks(2, *job, "--out", two))
    assert codes == [0, 0], errors
    assert {path.name: path.read_bytes() for path in (two / "shards").iterdir()} == whole


@pytest.mark.slow
def test_two_processes_share_a_target_whose_cache_goes_to_a_url(job, bucket, cli, tmp_path):
    job = [*job, "--limit", "10"]
    assert cli("extract", *job, "--out", tmp_path / "one")[0] == 0
    codes, errors = ends(ranks(2, *job, "--out", bucket, "--scratch", tmp_path / "scratch"))
    assert codes == [0, 0], errors
    assert_same_states(tmp_path / "one", bucket)


@pytest.mark.slow
def test_a_target_that_cannot_be_divided_so_is_refused_and_nothing_hangs(job, tmp_path):
    """torchrun ends the others once rank 0 has refused: they wait where a signal finds them."""
    rank_0, *others = ranks(3, *job, "--out", tmp_path / "cache")
    assert ends([rank_0])[0] == [2]
    assert "3 processes do not divide" in rank_0.stderr.read_text()
    for process in others:
        process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    assert ends(others)[0] == [143, 143]
    assert time.monotonic() - began < 5
    assert not (tmp_path / "cache").exists()


def refuse_to_write() -> None:
    """The disk refuses the first shard, in the middle of the job."""
    from cache_format.errors import StorageError
    from cache_format.writing.shard_buffer import ShardBuffer

    def commit(*_: object, **__: object) -> int:
        raise StorageError("shards", "write", OSError(28, "No space left on device"))

    ShardBuffer.commit = commit  # type: ignore[method-assign]


def test_an_error_of_rank_0_lets_the_others_go(job, tmp_path):
    codes, errors = ends(ranks(2, *job, "--limit", "10", "--out", tmp_path / "cache", before=refuse_to_write))
    assert codes == [1, 0], errors
    assert "No space left on device" in errors
    assert "Traceback" not in errors


def test_a_rank_that_is_gone_hangs_nobody(job, tmp_path):
    rank_0, other = ranks(2, *job, "--out", tmp_path / "cache")
    commands.wait_for(lambda: list((tmp_path / "cache" / "shards").glob("shard-*")))
    other.kill()
    began = time.monotonic()
    assert ends([rank_0])[0] == [1]
    assert time.monotonic() - began < 10
    assert "another process of the group is gone" in rank_0.stderr.read_text()
    codes, errors = ends(ranks(2, *job, "--out", tmp_path / "cache"))
    assert codes == [0, 0], errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all(job, tmp_path, number):
    processes = ranks(2, *job, "--out", tmp_path / "cache")
    commands.wait_for(lambda: list((tmp_path / "cache" / "shards").glob("shard-*")))
    for process in processes:
        process.send_signal(number)
    began = time.monotonic()
    codes, errors = ends(processes)
    assert codes == [128 + number] * 2, errors
    assert time.monotonic() - began < 10
    assert "Traceback" not in errors
    assert not (tmp_path / "cache" / ".lock").exists()


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


def test_an_environment_that_says_half_is_told(job, tmp_path):
    code, _, errors = commands.run("extract", *job, "--out", tmp_path / "c", "--tp-plan", "auto", WORLD_SIZE="2")
    assert (code, "RANK and MASTER_ADDR and MASTER_PORT not set" in errors) == (2, True), errors


@pytest.mark.parametrize(
    ("processes", "heads", "way_out"),
    [
        (8, (64, 4), "start 2 or 4, or"),
        (3, (6, 2), "start 2, or"),
        (2, (7, 7), "start 7, or"),
        (2, (5, 1), "no number does"),
    ],
)
def test_refused_numbers_of_processes_come_with_those_that_work(processes, heads, way_out):
    """The first are Qwen3-235B's heads on the 8 devices of a node."""
    config = Qwen3MoeConfig(num_attention_heads=heads[0], num_key_value_heads=heads[1])
    with pytest.raises(InputError, match=f"{processes} processes do not divide .* {way_out}"):
        parallel_plan(config, processes)
    if heads[1] > 1:
        assert parallel_plan(config, heads[1]).tp_size == heads[1]
