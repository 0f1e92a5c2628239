"""What following costs a shard: from its commit to the first batch of it, and beside the same batches of a whole cache.

    python scripts/bench_follow.py --shards 40 --shard-mib 16

A writer thread commits the shards of a ready cache one by one (a rename), each once the reader waits for it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import threading
import time
from pathlib import Path

import synthetic_cache
import torch

from cache_format import FeatureCache
from cache_format.layout.manifest import Manifest
from cache_format.layout.shard_layout import shard_name
from cache_format.storage.lock import writing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=40)
    parser.add_argument("--shard-mib", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=1024)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-follow-") as folder:
        cache = Path(folder) / "cache"
        tokens = options.shards * (options.shard_mib << 20) // (2 * 5 * options.hidden)
        if tokens < 4 * 512 * options.shards:
            parser.error("--shard-mib: a shard has to hold at least a batch, 4 samples of 512 tokens")
        synthetic_cache.write_cache(
            cache,
            [512] * (tokens // 512),
            dtype="bfloat16",
            hidden=options.hidden,
            target_layer_ids=[1, 2, 3, 4, 5],
            shard_bytes=options.shard_mib << 20,
            states=lambda sample_id, num_tokens: torch.zeros(num_tokens, 5 * options.hidden, dtype=torch.bfloat16),
        )
        measure(cache)


def measure(cache: Path) -> None:
    """Print the two figures of ``cache``."""
    count = Manifest.read(cache).totals.shards
    whole = FeatureCache.open(cache).loader(4)
    followed = FeatureCache.open(cache, follow=True)
    loader = followed.loader(4, window_shards=1)
    seconds: dict[str, list[float]] = {"whole": [], "followed": []}
    for _ in range(4):
        for name, batches in (("whole", whole), ("followed", loader)):
            started = time.monotonic()
            for _batch in batches:
                pass
            seconds[name].append(time.monotonic() - started)
    one, other = (statistics.median(seconds[name][1:]) for name in ("whole", "followed"))
    print(f"{count} shards that are all there: {one:.3f} s as a whole, {other:.3f} s followed, ", end="")
    print(f"{(other - one) / count * 1000:.1f} ms a shard")

    aside = cache.parent / "aside"
    shutil.move(cache / "shards", aside)
    (cache / "shards").mkdir()
    followed.seek(0)
    asked, committed, latencies = threading.Semaphore(0), [0.0] * count, []

    def commit() -> None:
        with writing(cache):
            for number in range(count):
                asked.acquire()
                time.sleep(0.05)
                committed[number] = time.monotonic()
                os.rename(aside / Path(shard_name(number)).name, cache / shard_name(number))

    thread = threading.Thread(target=commit)
    thread.start()
    asked.release()
    seen: set[int] = set()
    for _batch in loader:
        number = followed.state_dict()["shards_done"]
        if number not in seen:
            seen.add(number)
            latencies.append(time.monotonic() - committed[number])
            asked.release()
    thread.join()
    print(
        f"from the commit of a shard to its first batch: median {statistics.median(latencies) * 1000:.1f} ms, ", end=""
    )
    print(f"worst {max(latencies) * 1000:.1f} ms of {len(latencies)}")


if __name__ == "__main__":
    main()
