"""What handing out shards by Ray costs, a shard.

    python scripts/bench_ray.py

The same command is run with and without `--engine ray` (a cluster of this machine alone, one actor, no GPU), over few
and over many shards of a tiny target, alternating. Starting Ray and loading the target cost the same for few as for
many, so the difference of the two is the shards alone; the overhead is what remains of it beyond the local run's.
One thread of the processor each way, as Ray gives an actor of one CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import make_demo_data
import make_tiny_target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--few", type=int, default=100, help="rows of the small run")
    parser.add_argument("--many", type=int, default=1100, help="rows of the large run")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data, target = Path(folder, "train.jsonl"), Path(folder, "target")
        make_demo_data.write_demo_data(data, args.many)
        make_tiny_target.make_tiny_target(target, data, layers=6, hidden_size=64, vocab_size=2048)
        job = ["--target", str(target), "--data", str(data), "--device", "cpu", "--target-layers", "0,2,4"]
        job += ["--max-length", "256", "--shard-size", "128KiB", "--batch-tokens", "512", "--json"]

        def run(name: str, rows: int, *options: str) -> tuple[float, int]:
            command = [sys.executable, "-m", "extractor", "extract", *job, "--limit", str(rows), *options]
            began = time.perf_counter()
            done = subprocess.run(
                [*command, "--out", f"{folder}/{name}"],
                env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                check=True,
            )
            return time.perf_counter() - began, json.loads(done.stdout)["shards"]

        ways = {"local": (), "ray": ("--engine", "ray", "--num-workers", "1")}
        a_shard: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(args.repeat):
            for way, options in ways.items():
                few, few_shards = run(f"{way}-few-{turn}", args.few, *options)
                many, many_shards = run(f"{way}-many-{turn}", args.many, *options)
                a_shard[way].append((many - few) / (many_shards - few_shards) * 1e3)
        print(f"{many_shards - few_shards} shards more, median of {args.repeat}")
        for way, values in a_shard.items():
            spread = f"{min(values):.1f}-{max(values):.1f}"
            print(f"{way:6} {statistics.median(values):6.1f} ms a shard ({spread})")
        over = [ray - local for local, ray in zip(a_shard["local"], a_shard["ray"], strict=True)]
        print(f"Ray's overhead: {statistics.median(over):.1f} ms a shard ({min(over):.1f}-{max(over):.1f})")


if __name__ == "__main__":
    main()
