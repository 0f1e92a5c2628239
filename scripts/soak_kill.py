"""Kill `extract` at random moments, resume it, and compare what comes out with an uninterrupted run, byte for byte.

    python scripts/soak_kill.py --kills 200

Every other kill comes at a random time of an uninterrupted run's duration, the others at a random file-system operation
(the child kills itself just before it), so that short moments - a commit, the seal - get their share. A job that
completes is compared and the next one begun in a new folder. Exit code 1 if a byte differs or a resume fails.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from cache_format.errors import DFlashCacheError
from cache_format.layout.manifest import MANIFEST_NAME, Manifest
from cache_format.layout.shard_layout import shard_name

ROWS_PER_PART = 64
"""Of samples/: small, so that kills fall between parts."""
PRELOADED = ["extractor.cli", "extractor.job.job", "transformers.models.qwen3.modeling_qwen3"]


@dataclass
class SoakReport:
    """What a soak did."""

    kills: int = 0
    jobs: int = 0
    landed: Counter[str] = field(default_factory=Counter)
    """state of the folder just after a kill -> kills"""
    lost: Counter[int] = field(default_factory=Counter)
    """shards begun by the killed process and not finished -> kills; of kills that came while shards were made"""
    differing_bytes: int = 0
    failures: list[str] = field(default_factory=list)
    """files that differ, and attempts that ended with an error"""
    seconds: float = 0.0

    @property
    def whole(self) -> bool:
        """True where every job came out as it should."""
        return not self.failures


def start(arguments: Sequence[str | Path], log: Path, die_at: int = 0) -> ForkServerProcess:
    """Start the command in a process forked from one that has all imports done; it writes to ``log``.

    It kills itself just before its ``die_at``-th file-system operation (from 1), if it gets that far; where it ends,
    their number is in ``log`` with the suffix ``.count``. The shards that it has begun with are in ``.begun``.
    """
    log.with_suffix(".begun").write_text("")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_command, args=([str(a) for a in arguments], log, die_at))
    process.start()
    return process


def run(arguments: Sequence[str | Path], log: Path, die_at: int = 0) -> int:
    """As :func:`start`, and wait; the exit code, -9 where it killed itself."""
    process = start(arguments, log, die_at)
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def operations(log: Path) -> int:
    """File-system operations of the run that ended last."""
    return int(log.with_suffix(".count").read_text())


def soak(
    job: Sequence[str], folder: Path, kills: int, seed: int, say: Callable[[str], None] = lambda text: None
) -> SoakReport:
    """Spend at least ``kills`` kills on ``extract`` with arguments ``job``, in new folders below ``folder``."""
    rng, report, log, began = random.Random(seed), SoakReport(), folder / "log", time.monotonic()
    for name in ("whole", "again"):
        timed = time.monotonic()
        assert run(["extract", *job, "--out", folder / name], log) == 0, log.read_text()
        duration, steps = time.monotonic() - timed, operations(log)
    whole = contents(folder / "whole")
    _compare(whole, folder / "again", report)
    say(f"an uninterrupted run: {duration:.2f} s, {steps} file-system operations, {len(whole)} files")
    out = folder / "job-0"
    while report.kills < kills or out.exists():
        code = _attempt(["extract", *job, "--out", out], log, rng, duration, steps)
        if code == -signal.SIGKILL:
            report.kills += 1
            report.landed[state_of(out)] += 1
            begun = {int(number) for number in log.with_suffix(".begun").read_text().split()}
            if begun:
                report.lost[sum(not (out / shard_name(number)).exists() for number in begun)] += 1
        elif code == 0:
            report.jobs += 1
            _compare(whole, out, report)
            say(f"{report.kills:4d} kills, {report.jobs:3d} jobs, {report.differing_bytes} differing bytes")
            out = folder / f"job-{report.jobs}"
        else:
            report.failures.append(f"{out.name}: exit code {code}: {log.read_text()}")
            break
    report.seconds = time.monotonic() - began
    return report


def _attempt(arguments: list[str | Path], log: Path, rng: random.Random, duration: float, steps: int) -> int | None:
    if rng.random() < 0.5:
        return run(arguments, log, rng.randint(1, steps))
    process = start(arguments, log)
    process.join(rng.uniform(0, duration))
    process.kill()
    process.join()
    return process.exitcode


def state_of(cache: Path) -> str:
    """How far a killed job had come, for people."""
    if not (cache / "manifest.json").exists():
        return "before the manifest"
    try:
        manifest = Manifest.read(cache)
    except DFlashCacheError as error:
        return f"BAD MANIFEST: {error}"
    half = ", a file half-written" if any(cache.rglob(".*.tmp")) else ""
    if manifest.totals is None:
        what = "writing target/" if any((cache / "target").glob("*")) else "preparing samples/"
        return f"preparing: {what}{half}"
    if manifest.state == "complete":
        return f"complete{half}"
    done = len(list((cache / "shards").glob("shard-*")))
    shards = "all" if done == manifest.totals.shards else "some" if done else "no"
    tables = sum((cache / name).exists() for name in ("index.arrow", "shards.arrow"))
    return f"extracting: {shards} shards, {tables} tables{half}"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder`` by its relative name, the manifest without the command line that made it."""
    found = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if not p.is_dir()}
    if MANIFEST_NAME in found:
        with suppress(DFlashCacheError):
            found[MANIFEST_NAME] = replace(Manifest.read(folder), command=None).to_bytes()
    return found


def _compare(whole: dict[str, bytes], out: Path, report: SoakReport) -> None:
    """Count what differs in ``out``; a folder that does not is deleted."""
    found = contents(out)
    different = [name for name in sorted(whole.keys() | found.keys()) if whole.get(name) != found.get(name)]
    for name in different:
        pairs = zip_longest(whole.get(name, b""), found.get(name, b""))
        report.differing_bytes += (count := sum(a != b for a, b in pairs))
        report.failures.append(f"{out.name}/{name}: {count} bytes differ")
    if not different:
        shutil.rmtree(out)


def _command(arguments: list[str], log: Path, die_at: int) -> None:
    """In the child: the command line as the user runs it."""
    import torch
    from tqdm import tqdm

    import extractor.data.prepare
    from extractor.cli import main

    tqdm.set_lock(threading.RLock())  # its own is a named semaphore, and of those Python keeps a list
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    extractor.data.prepare.ROWS_PER_PART = ROWS_PER_PART
    sys.argv = ["dflash-cache", *arguments]
    _note_begun_shards(log.with_suffix(".begun"))
    count = _count_operations(die_at)
    try:
        main()
    finally:
        log.with_suffix(".count").write_text(str(count[0]))


def _note_begun_shards(path: Path) -> None:
    """Write the number of each shard to ``path`` when the target begins with it."""
    from extractor.job.run_shards import ShardRunner

    noted, fill = os.open(path, os.O_WRONLY | os.O_APPEND), ShardRunner._fill

    def begin(runner: ShardRunner, buffer: Any, shard: Any, *rest: Any) -> Any:
        os.write(noted, f"{shard.number}\n".encode())
        return fill(runner, buffer, shard, *rest)

    ShardRunner._fill = begin  # type: ignore[method-assign]


def _count_operations(die_at: int) -> list[int]:
    """Count (in the list's one element) what changes files or makes them durable, and die before the n-th."""
    count, fsync = [0], os.fsync

    def step() -> None:
        count[0] += 1
        if count[0] == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def synced(descriptor: int) -> None:
        step()
        fsync(descriptor)

    def hook(event: str, arguments: tuple) -> None:
        opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if opened or event in ("os.rename", "os.mkdir", "os.remove", "os.truncate", "fcntl.flock"):
            step()

    os.fsync = synced
    sys.addaudithook(hook)
    return count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where to work (kept); default: a temporary folder")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    import make_demo_data
    import make_tiny_target

    with tempfile.TemporaryDirectory(prefix="soak-kill-") as temporary:
        folder = args.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        data, target = folder / "train.jsonl", folder / "target"
        make_demo_data.write_demo_data(data, 200)
        make_tiny_target.make_tiny_target(target, data, layers=6, hidden_size=64, vocab_size=2048)
        job = ["--target", str(target), "--data", str(data), "--device", "cpu", "--target-layers", "4,0,2"]
        job += ["--max-length", "256", "--shard-size", "2MiB", "--batch-tokens", "2048"]
        report = soak(job, folder, args.kills, args.seed, lambda text: print(text, flush=True))
    for where, count in sorted(report.landed.items(), key=lambda item: -item[1]):
        print(f"  {count:4d}  {where}")
    lost = ", ".join(f"{shards}: {kills}" for shards, kills in sorted(report.lost.items()))
    print(f"begun shards that a kill has cost: kills, of those while shards were made: {lost}")
    for failure in report.failures:
        print(f"FAILED {failure}")
    print(f"{report.kills} kills, {report.jobs} jobs, {report.differing_bytes} differing bytes, {report.seconds:.0f} s")
    return 0 if report.whole else 1


if __name__ == "__main__":
    sys.exit(main())
