"""Remote reads with read-ahead against what fsspec alone downloads from the same server, in turns.

    python scripts/bench_remote.py [--url s3://bucket/cache] [--megabytes 1024] [--rounds 5]

Without --url a synthetic cache is put on an S3 server started here (moto's, in Python: it is the bottleneck, and it
takes one of the machine's cores). Each round reads every shard once: with fsspec's own ``get`` of all shards; through
``cache.loader(shuffle="window")`` with an empty ``cache_dir`` (downloaded ahead, each sample's checksum compared,
batches padded); and by range. GB/s of shard bytes; the last lines are the ratios of the medians.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import numpy as np
import synthetic_cache
import torch

from cache_format import FeatureCache
from cache_format.storage.store import Store

LAYERS, HIDDEN, SHARD_BYTES = [1, 9, 17, 25, 33], 1024, 64 << 20


@contextmanager
def server() -> Iterator[None]:
    """An S3 server on loopback with the bucket ``bench``; the environment leads clients to it."""
    with tempfile.TemporaryFile() as log:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            while not (found := re.search(rb"http://127\.0\.0\.1:\d+", os.pread(log.fileno(), 1 << 16, 0))):
                if process.poll() is not None:
                    raise SystemExit("moto's server does not start; pip install 'moto[server]'")
                time.sleep(0.05)
            os.environ.update(
                AWS_ENDPOINT_URL_S3=found[0].decode(), AWS_ACCESS_KEY_ID="any", AWS_SECRET_ACCESS_KEY="any"
            )
            fsspec.filesystem("s3").mkdir("bench")
            yield
        finally:
            process.kill()
            process.wait()


def make_cache(url: str, megabytes: int, folder: Path) -> None:
    """Put a cache of log-normal lengths there."""
    token_bytes = len(LAYERS) * HIDDEN * 2 + 6
    rng, lengths = np.random.default_rng(0), []
    while sum(lengths) * token_bytes < megabytes << 20:
        lengths.append(int(np.clip(rng.lognormal(6.2, 0.6), 16, 2048)))
    states = torch.randn(2048, len(LAYERS) * HIDDEN).to(torch.bfloat16)
    synthetic_cache.write_cache(
        folder,
        lengths,
        dtype="bfloat16",
        hidden=HIDDEN,
        target_layer_ids=LAYERS,
        shard_bytes=SHARD_BYTES,
        states=lambda sample_id, num_tokens: states[:num_tokens],
    )
    store = Store(url)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            store.upload(path, path.relative_to(folder).as_posix())


def by_fsspec(url: str) -> None:
    """fsspec alone: all shards into files, as many at a time as it likes."""
    filesystem = fsspec.filesystem("s3", skip_instance_cache=True)
    with tempfile.TemporaryDirectory() as folder:
        filesystem.get(f"{url}/shards/", folder + "/", recursive=True)


def read_all(cache: FeatureCache, **options: object) -> None:
    """One epoch."""
    for _ in cache.loader(batch_tokens=16384, window_shards=4, **options):  # type: ignore[arg-type]
        pass


def with_read_ahead(url: str) -> None:
    """The loader, its shards downloaded ahead into an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        read_all(FeatureCache.open(url, cache_dir=folder), shuffle="window")


def by_range(url: str) -> None:
    """The loader, samples read by range."""
    read_all(FeatureCache.open(url), shuffle=True)


def main() -> None:
    """Run the ways in turns and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="an existing cache; default: one made on a server started here")
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.url:
        run(options.url, options.rounds)
        return
    with server(), tempfile.TemporaryDirectory() as folder:
        make_cache("s3://bench/cache", options.megabytes, Path(folder) / "cache")
        run("s3://bench/cache", options.rounds)


def run(url: str, rounds: int) -> None:
    """``rounds`` times each way, in turns, after one of each that does not count."""
    size = sum(bytes_ for name, bytes_ in Store(url).list().items() if name.startswith("shards/"))
    ways: dict[str, Callable[[str], None]] = {
        "fsspec alone": by_fsspec,
        "loader, read ahead": with_read_ahead,
        "loader, by range": by_range,
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way(url)
            if turn:
                speeds[name].append(size / (time.perf_counter() - started) / 1e9)
    print(f"{size / 1e6:,.0f} MB of shards, {rounds} rounds in turns, {os.cpu_count()} cores")
    for name, found in speeds.items():
        print(f"{name:<20} {statistics.median(found):6.3f} GB/s   ({min(found):.3f} - {max(found):.3f})")
    base = statistics.median(speeds["fsspec alone"])
    for name in list(ways)[1:]:
        print(f"{name} / fsspec alone: {100 * statistics.median(speeds[name]) / base:.0f} %")


if __name__ == "__main__":
    main()
