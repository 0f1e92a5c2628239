"""Shared by all tests: a chat dataset and a tiny target, made once a session by the project's own scripts."""

from __future__ import annotations

import fcntl
import functools
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import commands
import hypothesis
import jobs
import pytest
from s3 import _proxy, bucket, proxy, s3, s3_port  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT / "scripts", ROOT / "tests"):
    sys.path.insert(0, str(folder))

# A shell's background jobs ignore Ctrl-C, and so would every process that tests send one.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Before anything imports datasets: no network, and nothing left in the user's cache folder.
_datasets_cache = tempfile.TemporaryDirectory(prefix="dflash-cache-tests-")
# One thread a process: the suite runs several side by side, and threads that wait for each other spin.
os.environ.update(
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    HF_DATASETS_CACHE=_datasets_cache.name,
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
)


hypothesis.settings.register_profile("quick", max_examples=50, deadline=None, derandomize=True)
hypothesis.settings.register_profile("deep", max_examples=2000, deadline=None)
hypothesis.settings.load_profile("quick")

LONGEST_FIRST = [
    *("test_ray", "test_ray_nodes", "test_kill", "test_store_job", "test_faults", "test_tensor_parallel"),
    *("test_extract", "test_signals", "test_workers", "test_prepare", "test_slurm", "test_run", "test_export"),
    "test_loss_mask",
]
"""Files that take long: begun first, so that no process is at one while the others have nothing left to do."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


def pytest_sessionfinish() -> None:
    # Not left to the end of the process: those of xdist end without it.
    for folder in (_datasets_cache, commands.outputs()):
        folder.cleanup()


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """``once(name, make)``: what ``make`` puts at a path, made once for all processes that the suite runs in."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def path_of(name: str, make: Callable[[Path], None]) -> Path:
        path = root / "shared" / name
        path.parent.mkdir(exist_ok=True)
        with open(path.with_name(f"{name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                unfinished = path.with_name(f"unfinished-{name}")
                make(unfinished)
                unfinished.rename(path)
        return path

    return path_of


@pytest.fixture(scope="session")
def demo_jsonl(once) -> Path:
    """300 conversations with ``messages``."""
    import make_demo_data

    return once("train.jsonl", lambda path: make_demo_data.write_demo_data(path, 300))


@pytest.fixture(scope="session")
def tiny_target(once, demo_jsonl: Path) -> Path:
    """Folder of a 6-layer, 64-wide Qwen3 with random weights and a tokenizer of 2,048 entries."""
    import make_tiny_target

    sizes = {"layers": 6, "hidden_size": 64, "vocab_size": 2048}
    return once("tiny", lambda path: make_tiny_target.make_tiny_target(path, demo_jsonl, **sizes))


@pytest.fixture
def cli(monkeypatch, capsys):
    """Run the command in this process: ``cli("verify", path) -> (exit code, stdout, stderr)``."""

    from extractor.cli import main

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dflash-cache", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        return int(exit_.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture(scope="session")
def job(tiny_target, demo_jsonl) -> list[str]:
    """Arguments of a small extraction into 10 shards or so."""
    return [
        *("--target", str(tiny_target), "--data", str(demo_jsonl), "--device", "cpu"),
        *("--target-layers", ",".join(map(str, jobs.LAYER_IDS))),
        *("--max-length", "256", "--shard-size", "2MiB", "--batch-tokens", "2048", "--limit", "120"),
    ]


@pytest.fixture(scope="session")
def made(job, once) -> Path:
    """A complete cache of that job, made by the command as a process of its own."""
    return once("made", lambda out: commands.made("extract", *job, "--out", out))


@pytest.fixture(scope="session")
def small_job(tiny_target, tmp_path_factory) -> list[str]:
    """Arguments of an extraction of 6 samples of 32 tokens into 3 shards.

    Not from the demo data: the docstrings it is made of differ from one Python to another.
    """
    data = tmp_path_factory.mktemp("small") / "train.jsonl"
    turns = [("user", "hi"), ("assistant", "one two three four " * 50)]
    rows = [{"messages": [{"role": role, "content": f"{n} {text}"} for role, text in turns]} for n in range(6)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        *("extract", "--target", str(tiny_target), "--data", str(data), "--device", "cpu"),
        *("--target-layers", "0,3", "--max-length", "32", "--shard-size", "64KiB", "--limit", "6"),
    ]


@pytest.fixture(scope="module")
def loaded_once():
    """Target, tokenizer and rows are loaded once for all runs of a module: hundreds of them."""
    import torch

    import extractor.job.job
    import extractor.target.load_target

    load_target, load_tokenizer = (
        functools.cache(f) for f in (extractor.target.load_target.load_target, extractor.job.job.load_tokenizer)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extractor.target.load_target, "load_target", load_target)
        patch.setattr(extractor.job.job, "load_tokenizer", load_tokenizer)
        patch.setattr(extractor.job.job, "open_source", functools.cache(extractor.job.job.open_source))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)
