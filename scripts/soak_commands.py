"""Kill `recode`, `repair` and `export` at random file-system operations, run the same command again, compare the bytes.

    python scripts/soak_commands.py --kills 50

Of each: an uninterrupted run shows how many operations there are and what comes out. Then, again and again, the command
is killed just before a random operation, sometimes once more while it resumes, and run to its end; `repair` is followed
by `extract`, as it says. Exit code 1 if a byte differs, a run fails.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import soak_kill

KILLED = -9


@dataclass(frozen=True)
class Work:
    """A command, and how to see that it came to the right end."""

    name: str
    prepare: Callable[[Path], None]
    """make what it works on, below a folder"""
    command: Callable[[Path], list[str | Path]]
    ends_with: int
    """its exit code"""
    then: Callable[[Path], list[str | Path]] | None
    """what has to be run after it"""
    result: str
    """folder whose bytes count"""


def works(source: Path, job: list[str]) -> list[Work]:
    """``source``: a complete raw cache of ``job``."""

    def damage(folder: Path) -> None:
        cache = Path(shutil.copytree(source, folder / "cache"))
        for number in (1, 3):
            path = cache / "shards" / f"shard-{number:05d}.safetensors"
            data = bytearray(path.read_bytes())
            data[-3000] ^= 1
            path.write_bytes(data)
        (cache / "index.arrow").unlink()

    found = [
        Work(
            f"recode {codec}",
            lambda folder: None,
            lambda folder, codec=codec: ["recode", source, folder / "out", "--codec", codec],  # type: ignore[misc]
            0,
            None,
            "out",
        )
        for codec in ("fp8", "zbits")
    ]
    found.append(
        Work(
            "repair",
            damage,
            lambda folder: ["repair", folder / "cache", "--yes"],
            1,
            lambda folder: ["extract", *job, "--out", folder / "cache"],
            "cache",
        )
    )
    found += [
        Work(
            f"export {layout}",
            lambda folder: None,
            lambda folder, layout=layout: ["export", source, folder / "out", "--to", layout],  # type: ignore[misc]
            0,
            None,
            "out",
        )
        for layout in ("specforge", "speculators", "modelopt", "deepspec", "nemo-dspark", "angelslim")
    ]
    return found


def without_quarantine(folder: Path) -> dict[str, bytes]:
    """Bytes below ``folder``; what repair set aside does not count."""
    files = soak_kill.contents(folder)
    return {name: data for name, data in files.items() if not name.startswith("quarantine/")}


def finish(work: Work, folder: Path, log: Path) -> str:
    """Run it, and what follows, to the end; what went wrong, or ""."""
    code = soak_kill.run(work.command(folder), log)
    # A repair whose manifest was already changed finds nothing damaged, and an unfinished cache.
    if code != work.ends_with and not (work.then and code in (0, 1)):
        return f"exit code {code}: {log.read_text()}"
    if work.then and (code := soak_kill.run(work.then(folder), log)):
        return f"then exit code {code}: {log.read_text()}"
    return ""


def soak(work: Work, below: Path, kills: int, rng: random.Random) -> tuple[int, list[str]]:
    """Kills spent, and what went wrong."""
    log, failures, spent = below / "log", [], 0
    whole = below / "whole"
    whole.mkdir()
    work.prepare(whole)
    code = soak_kill.run(work.command(whole), log)
    assert code == work.ends_with, log.read_text()
    steps = soak_kill.operations(log)
    if work.then:
        assert soak_kill.run(work.then(whole), log) == 0, log.read_text()
    expected = without_quarantine(whole / work.result)
    while spent < kills:
        folder = below / f"at-{spent}"
        folder.mkdir()
        work.prepare(folder)
        step = rng.randint(1, steps)
        for at in [step, rng.randint(1, steps)][: rng.choice([1, 1, 2])]:
            spent += soak_kill.run(work.command(folder), log, die_at=at) == KILLED
        wrong = finish(work, folder, log)
        found = without_quarantine(folder / work.result) if not wrong else expected
        if found != expected:
            names = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
            wrong = f"differ: {names[:5]}"
        if wrong:
            failures.append(f"{work.name}, killed at operation {step} of {steps}: {wrong}")
        shutil.rmtree(folder)
    return spent, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="of each command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="commands whose name begins with this")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    import make_demo_data
    import make_tiny_target

    failures: list[str] = []
    with tempfile.TemporaryDirectory(prefix="soak-commands-") as temporary:
        folder = Path(temporary)
        data, target = folder / "train.jsonl", folder / "target"
        make_demo_data.write_demo_data(data, 60)
        make_tiny_target.make_tiny_target(target, data, layers=6, hidden_size=64, vocab_size=2048)
        job = ["--target", str(target), "--data", str(data), "--device", "cpu", "--target-layers", "0,2,5"]
        job += ["--max-length", "128", "--shard-size", "512KiB", "--batch-tokens", "1024"]
        job += ["--capture", "last_hidden_states"]
        source = folder / "source"
        assert soak_kill.run(["extract", *job, "--out", source], folder / "log") == 0, (folder / "log").read_text()
        for work in works(source, job):
            if not work.name.startswith(args.only or ""):
                continue
            below = folder / work.name.replace(" ", "-")
            below.mkdir()
            began = time.monotonic()
            spent, wrong = soak(work, below, args.kills, random.Random(args.seed))
            failures += wrong
            print(f"{work.name}: {spent} kills, {len(wrong)} failures, {time.monotonic() - began:.0f} s", flush=True)
            shutil.rmtree(below)
    for failure in failures:
        print(f"FAILED {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
