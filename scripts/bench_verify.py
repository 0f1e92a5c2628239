"""How fast is `verify`, against what it cannot beat: hashing memory, and reading the disk.

    python scripts/bench_verify.py --gib 4

In one run, alternating, on one synthetic cache (samples of log-normal length, Qwen3-8B's width: 40 KB a token):
  hash        XXH3 over data in memory, one thread a core: the hashing that verify has to do, and nothing else
  read        the shards read with preadv into one reused buffer a thread: the reading that verify has to do
  verify      `cache_format.upkeep.verify.verify`, all of it
Warm: the files are in the page cache, so `read` is a copy from memory. Cold: their pages are dropped first
(posix_fadvise; no root needed), so `read` is the disk. The ratio is verify's speed over the slower of the two others.
Last, what `FeatureCache.open(verify="sample")` adds to reading every sample once.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import xxhash
from synthetic_cache import drop_pages, write_large_cache

from cache_format import FeatureCache
from cache_format.upkeep.verify import verify

CHUNK = 4 << 20
THREADS = os.cpu_count() or 1


def shards(cache: Path) -> list[Path]:
    return sorted((cache / "shards").iterdir())


def hash_memory(_cache: Path, num_bytes: int) -> None:
    data = np.ones(64 << 20, np.uint8)

    def work(_: int) -> None:
        hasher = xxhash.xxh3_64()
        for start in range(0, num_bytes // THREADS, CHUNK):
            at = start % len(data)
            hasher.update(data[at : at + CHUNK].data)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(work, range(THREADS)))


def read_files(cache: Path, _num_bytes: int) -> None:
    def work(path: Path) -> None:
        buffer, offset = np.empty(CHUNK, np.uint8), 0
        fd = os.open(path, os.O_RDONLY)
        while count := os.preadv(fd, [buffer.data], offset):
            offset += count
        os.close(fd)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(work, shards(cache)))


def run_verify(cache: Path, _num_bytes: int) -> None:
    report = verify(cache)
    assert report.whole, report.problems


def read_samples(cache: Path, check: str | None) -> None:
    opened = FeatureCache.open(cache, verify=check)
    for i in range(len(opened)):
        opened[i].hidden_states.view(torch.int16).sum()


def timed(function: Callable[[], None]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=2.0, help="size of the cache")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to make it (a folder on the disk to measure)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        cache = Path(folder) / "cache"
        write_large_cache(cache, args.gib)
        num_bytes = sum(path.stat().st_size for path in shards(cache))
        print(f"{num_bytes / 2**30:.2f} GiB in {len(shards(cache))} shards, {THREADS} threads, median of {args.repeat}")
        print(f"{'':6}{'hash':>10}{'read':>10}{'verify':>10}   GB/s; verify / slower of the two")
        for kind in ("warm", "cold"):
            seconds: dict[str, list[float]] = {"hash": [], "read": [], "verify": []}
            for _ in range(args.repeat):
                for name, function in (("hash", hash_memory), ("read", read_files), ("verify", run_verify)):
                    if kind == "cold":
                        drop_pages(cache)
                    seconds[name].append(timed(lambda f=function: f(cache, num_bytes)))  # type: ignore[misc]
            speed = {name: num_bytes / statistics.median(values) / 1e9 for name, values in seconds.items()}
            ratio = speed["verify"] / min(speed["hash"], speed["read"])
            print(f"{kind:6}" + "".join(f"{value:10.2f}" for value in speed.values()) + f"   {ratio:.0%}")
        plain = statistics.median(timed(lambda: read_samples(cache, None)) for _ in range(args.repeat))
        checked = statistics.median(timed(lambda: read_samples(cache, "sample")) for _ in range(args.repeat))
        print(
            f'every sample read once: {plain:.2f} s, with verify="sample" {checked:.2f} s: '
            f"{num_bytes / (checked - plain) / 1e9:.1f} GB/s of checking"
        )


if __name__ == "__main__":
    main()
