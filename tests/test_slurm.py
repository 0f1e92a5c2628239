"""torchrun for real, srun by its environment, and the array recipe under stand-ins for srun and scontrol."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from jobs import contents, on

from cache_format.errors import InputError
from extractor.config import DataOptions, ExtractOptions, TargetOptions
from extractor.job import divided_preparation
from extractor.job import job as job_module
from extractor.job.worker import Worker

ROOT = Path(__file__).resolve().parent.parent
SRUN = """#!/usr/bin/env bash
while [[ "$1" == --* ]]; do shift; done
export SLURM_STEP_ID=0 SLURM_PROCID=0
exec "$@"
"""
SCONTROL = '#!/usr/bin/env bash\necho "$@" >> "$(dirname "$0")/requeued"\n'


@pytest.mark.slow
def test_torchrun_gives_the_bytes_of_one_process(job, made, tmp_path):
    out = tmp_path / "cache"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    run = subprocess.run(
        [*command, "-m", "extractor", "extract", *job, "--out", out],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("prepared 120 samples") == 1, "one prepares"
    assert run.stderr.count(": complete,") == 1, "one seals"
    assert run.stderr.count("has done its share") == 1
    assert contents(out) == contents(made)


@pytest.fixture
def stand_ins(tmp_path) -> Path:
    """Folder with a srun that runs its command, and a scontrol that notes what it is asked."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def start_task(task: int, job: list[str], out: Path, stand_ins: Path) -> subprocess.Popen:
    array = {"SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_COUNT": "2"}
    environment = {
        **os.environ,
        **array,
        "SLURM_ARRAY_TASK_MIN": "0",
        "SLURM_JOB_ID": str(10 + task),
        "SLURM_NTASKS": "1",
        "PATH": f"{stand_ins}:{os.environ['PATH']}",
        "DFLASH_COMMAND": f"{sys.executable} -m extractor",
    }
    command = ["bash", ROOT / "scripts" / "slurm_array.sh", *job, "--out", out]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, cwd=ROOT)


@pytest.mark.slow
def test_an_array_whose_task_is_preempted_and_requeued(job, made, stand_ins, tmp_path):
    out = tmp_path / "cache"
    tasks = [start_task(task, job, out, stand_ins) for task in (0, 1)]
    while not list((out / "samples").glob("*.arrow")):
        assert tasks[0].poll() is None, tasks[0].communicate()[1]
        time.sleep(0.005)
    tasks[1].send_signal(signal.SIGTERM)
    _, errors = tasks[1].communicate(timeout=60)
    assert tasks[1].returncode == 143, errors
    assert (stand_ins / "requeued").read_text() == "requeue 9_1\n", errors
    _, errors = tasks[0].communicate(timeout=120)
    assert tasks[0].returncode == 0, errors
    assert len(list((out / "shards").iterdir())) < len(list((made / "shards").iterdir()))
    again = start_task(1, job, out, stand_ins)
    _, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    assert contents(out) == contents(made)


def test_a_task_that_fails_is_not_requeued(job, stand_ins, tmp_path):
    task = start_task(0, on(job, tmp_path / "none.jsonl"), tmp_path / "cache", stand_ins)
    _, errors = task.communicate(timeout=60)
    assert task.returncode == 2
    assert "none.jsonl" in errors
    assert not (stand_ins / "requeued").exists()


def test_a_worker_whose_leader_does_nothing_says_so(tiny_target, demo_jsonl, tmp_path, monkeypatch):
    monkeypatch.setattr(divided_preparation, "PATIENCE_SECONDS", 1.0)
    options = ExtractOptions(
        out=tmp_path / "cache",
        target=TargetOptions(name=str(tiny_target), device="cpu", num_draft_layers=2),
        data=DataOptions(name=str(demo_jsonl)),
    )
    with pytest.raises(InputError, match=r"worker 1 has waited .* for worker 0 to prepare the samples"):
        job_module.extract(options, Worker(rank=1, world_size=2, job="one"))
    assert not (tmp_path / "cache" / ".lock").exists()
