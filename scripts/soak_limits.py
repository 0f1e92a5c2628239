"""Starve and stop a job in ways that a cluster does, resume it, and compare the bytes with an undisturbed run's.

    python scripts/soak_limits.py memory --rounds 40      # ulimit -v, from far too little to nearly enough
    python scripts/soak_limits.py cgroup --rounds 20      # a memory cgroup (root, cgroup v1): the kernel kills
    unshare -rm python scripts/soak_limits.py inodes      # a tmpfs that runs out of inodes, at every number of them
    python scripts/soak_limits.py stop --rounds 40        # SIGSTOP and SIGCONT of a worker of two, at random moments
    python scripts/soak_limits.py beside --rounds 20      # verify and inspect, again and again, beside extract

A disturbed run may fail (exit code 1 or 2, or a signal where the kernel kills), never with a traceback; what it leaves
is resumed without the limit, and the bytes are compared. Exit code 1 where anything else comes of it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import soak_kill

COMMAND = [sys.executable, "-c", "from extractor.cli import main; main()"]


class Soak:
    """A small job, what comes of it undisturbed, and what went wrong so far."""

    def __init__(self, folder: Path, seed: int):
        import make_demo_data
        import make_tiny_target

        self.folder, self.rng, self.failures = folder, random.Random(seed), list[str]()
        self.ends: Counter[str] = Counter()
        data, target = folder / "train.jsonl", folder / "target"
        make_demo_data.write_demo_data(data, 60)
        make_tiny_target.make_tiny_target(target, data, layers=6, hidden_size=64, vocab_size=2048)
        self.job = ["extract", "--target", str(target), "--data", str(data), "--device", "cpu"]
        self.job += ["--target-layers", "4,0,2", "--max-length", "256", "--shard-size", "512KiB"]
        self.job += ["--batch-tokens", "1024"]
        began = time.monotonic()
        self.resume(folder / "whole", "undisturbed")
        self.seconds = time.monotonic() - began
        self.whole = soak_kill.contents(folder / "whole")

    def fail(self, text: str) -> None:
        """Note what went wrong."""
        self.failures.append(text)
        print(f"FAILED {text}", flush=True)

    def resume(self, out: Path, what: str) -> bool:
        """Run the job to its end; whether it got there."""
        code = soak_kill.run([*self.job, "--out", out], self.folder / "log")
        if code:
            self.fail(f"{what}: resumed with exit code {code}: {(self.folder / 'log').read_text()[-500:]}")
        return code == 0

    def ended(self, code: int, text: str, what: str, *, may_be_killed: bool = False) -> None:
        """Count how a disturbed run ended; a traceback, or a code that says nothing, is a failure."""
        killed = code < 0 and may_be_killed
        self.ends["killed" if killed else f"exit code {code}"] += 1
        if "Traceback" in text or not (code in (0, 1, 2) or killed):
            self.fail(f"{what}: exit code {code}: {text[-1500:]}")

    def compare(self, out: Path, what: str) -> None:
        """Resume in ``out``, and compare."""
        if not self.resume(out, what):
            return
        found = soak_kill.contents(out)
        self.ends["compared"] += 1
        if found != self.whole:
            names = [name for name in found.keys() | self.whole.keys() if found.get(name) != self.whole.get(name)]
            self.fail(f"{what}: differ: {sorted(names)[:5]}")
        shutil.rmtree(out)


def run_limited(soak: Soak, out: Path, before: Callable[[], None]) -> subprocess.CompletedProcess[str]:
    """The job as a process of its own, ``before`` called in it first."""
    return subprocess.run([*COMMAND, *soak.job, "--out", str(out)], preexec_fn=before, capture_output=True, text=True)


def memory(soak: Soak, rounds: int) -> None:
    """Address space from 0.3 to 4 GiB: importing torch takes about 2 of it."""
    for number in range(rounds):
        limit = int(2**30 * soak.rng.uniform(0.3, 4.0))
        out = soak.folder / f"memory-{number}"
        ran = run_limited(soak, out, lambda limit=limit: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)))  # type: ignore[misc]
        # Below what the imports take the interpreter itself, or a library's own thread, ends as it likes.
        began = (out / "manifest.json").exists()
        soak.ends["began" if began else "did not begin"] += 1
        if began:
            soak.ended(ran.returncode, ran.stdout + ran.stderr, f"{limit >> 20} MiB", may_be_killed=True)
        soak.compare(out, f"{limit >> 20} MiB")


def cgroup(soak: Soak, rounds: int) -> None:
    """From 100 to 700 MiB; the kernel ends what takes more."""
    group = Path("/sys/fs/cgroup/memory") / f"soak-{os.getpid()}"
    group.mkdir()
    try:
        for number in range(rounds):
            limit = soak.rng.randint(100, 700) << 20
            out = soak.folder / f"cgroup-{number}"
            (group / "memory.limit_in_bytes").write_text(str(limit))
            ran = run_limited(soak, out, lambda: (group / "cgroup.procs").write_text(str(os.getpid())) and None)
            soak.ended(ran.returncode, ran.stdout + ran.stderr, f"{limit >> 20} MiB", may_be_killed=True)
            soak.compare(out, f"{limit >> 20} MiB")
    finally:
        group.rmdir()


def inodes(soak: Soak, rounds: int) -> None:
    """A tmpfs of 2, 3, ... inodes, until the job fits; it is then given more."""
    for number in range(2, rounds + 2):
        disk = soak.folder / f"disk-{number}"
        disk.mkdir()
        options = "remount,size=64m,nr_inodes=1000"
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size=64m,nr_inodes={number}", "none", disk], check=True)
        try:
            code = soak_kill.run([*soak.job, "--out", disk / "cache"], soak.folder / "log")
            text = (soak.folder / "log").read_text()
            soak.ended(code, text, f"{number} inodes")
            if code and "space" not in text:
                soak.fail(f"{number} inodes: does not say that there is no space: {text[-500:]}")
            subprocess.run(["mount", "-o", options, disk], check=True)
            soak.compare(disk / "cache", f"{number} inodes")
        finally:
            subprocess.run(["umount", "-l", disk], check=False)
        if code == 0:
            return


def stop(soak: Soak, rounds: int) -> None:
    """One of two workers stands still for a while, perhaps with a lock or half a file in its hand."""
    for number in range(rounds):
        out = soak.folder / f"stop-{number}"
        running = []
        for rank in range(2):
            environment = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": str(number)}
            log = open(soak.folder / f"rank-{rank}", "w+")  # noqa: SIM115
            running.append(
                (
                    subprocess.Popen(
                        [*COMMAND, *soak.job, "--out", str(out)],
                        env={**os.environ, **environment},
                        stdout=log,
                        stderr=log,
                    ),
                    log,
                )
            )
        victims = [process for process, _ in running]
        while any(process.poll() is None for process in victims):
            victim = soak.rng.choice(victims)
            time.sleep(soak.rng.uniform(0, soak.seconds / 2))
            if victim.poll() is None:
                with suppress(ProcessLookupError):
                    victim.send_signal(signal.SIGSTOP)
                    time.sleep(soak.rng.uniform(0.1, 2))
                    victim.send_signal(signal.SIGCONT)
                    soak.ends["stopped"] += 1
        for process, log in running:
            log.seek(0)
            soak.ended(process.wait(), log.read(), f"round {number}")
            log.close()
        soak.compare(out, f"round {number}")


def beside(soak: Soak, rounds: int) -> None:
    """What is unfinished is unfinished, never damaged; what is looked at is not changed."""
    for number in range(rounds):
        out = soak.folder / f"beside-{number}"
        process = soak_kill.start([*soak.job, "--out", out], soak.folder / "extract-log")
        while process.is_alive():
            if not (out / "manifest.json").exists():
                time.sleep(0.01)
                continue
            look = soak.rng.choice([["verify"], ["verify", "--quick"], ["verify", "--sample", "0.5"], ["inspect"]])
            code = soak_kill.run([look[0], out, *look[1:], "--json"], soak.folder / "log")
            text = (soak.folder / "log").read_text()
            soak.ended(code, text, f"{look} in round {number}")
            if look[0] == "verify" and code in (0, 1):
                problems = json.loads(text[text.index("{") :].splitlines()[0])["problems"]
                strange = [problem for problem in problems if problem["field"] != "state"]
                if strange:
                    soak.fail(f"{look} in round {number}: {strange[:3]}")
        soak.compare(out, f"round {number}")


WAYS = {"memory": memory, "cgroup": cgroup, "inodes": inodes, "stop": stop, "beside": beside}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    with tempfile.TemporaryDirectory(prefix="soak-limits-") as folder:
        soak = Soak(Path(folder), args.seed)
        WAYS[args.way](soak, args.rounds)
    ends = ", ".join(f"{count} {end}" for end, count in sorted(soak.ends.items()))
    print(f"{args.way}: {ends}; {len(soak.failures)} failures")
    return 1 if soak.failures else 0


if __name__ == "__main__":
    sys.exit(main())
