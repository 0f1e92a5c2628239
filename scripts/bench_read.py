"""How fast does a trainer get its batches, against the ways that other projects read, and against memcpy and the disk?

    python scripts/bench_read.py --gib 2

In one run, alternating, on the same samples (log-normal lengths, five layers in bfloat16), in the same random order, in
batches padded to their longest sample. GB/s count real tokens only, so padding is everybody's own loss. Each way gives
the same four tensors. Each of the others is run in a plain loop and in a torch DataLoader with two worker processes;
the better of the two counts.
  memcpy        one thread, and all of them, between two 256 MiB buffers
  raw read      preadv of the whole shards into one reused buffer a thread, which stays in the processor's cache; and
                with a place in memory for each byte, as a batch has: the limit of all that reads files
  ours          cache.loader(batch_size, threads); beside it, how much of a batch is padding, which is zeroed each time
  ours, codec   the same of recoded caches, B=4; GB/s of the states that come out, as bfloat16 in a batch on the host
  safe_open     safetensors' get_slice on our own shards, sample by sample, then collate
  per sample    one safetensors file a sample, load_file, then collate
  torch.save    one torch.save file a sample, torch.load, then collate
  padded        safetensors shards of samples padded to the longest of all, get_slice, then cut and collate
  mmap          a numpy memmap of flat shards, a copy of each sample, then collate
Cold: the files' pages are dropped before every pass, B=4; the limit of raw states is then the raw read of the same
shards, also cold. The others read in a plain loop.
Last: opening caches of 10^3 to 10^7 samples, and the time to the first batch.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from synthetic_cache import drop_pages, write_cache, write_large_cache
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cache_format import DFlashTargetBatch, FeatureCache, collate
from cache_format.layout.index import INDEX_NAME, SHARDS_NAME, Index, ShardRow, read_index, write_index, write_shards
from cache_format.layout.manifest import Manifest
from cache_format.layout.shard_layout import shard_name
from cache_format.upkeep.recode import recode

CORES = os.cpu_count() or 1
FIELDS = ("hidden_states", "input_ids", "loss_mask")
SAMPLES_A_PADDED_SHARD = 16
CODECS = ("zbits", "fp8", "quant", "quant:fine")


class Peer(Dataset):
    """A map-style dataset over files in another layout."""

    def __init__(self, cache: FeatureCache, folder: Path):
        self.folder, self.lengths = folder, cache.index.num_tokens
        self.handles: dict[Path, object] = {}

    def write(self, cache: FeatureCache) -> None:
        """Make its files."""

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> DFlashTargetBatch:
        hidden, ids, loss = (tensor.unsqueeze(0) for tensor in self.read(i))
        return DFlashTargetBatch(hidden, ids.long(), torch.ones_like(ids, dtype=torch.int64), loss.long())

    def read(self, i: int) -> Iterable[Tensor]:
        raise NotImplementedError

    def opened(self, path: Path) -> object:
        if path not in self.handles:
            self.handles[path] = safe_open(path, "pt")
        return self.handles[path]


class SafeOpen(Peer):
    def __init__(self, cache: FeatureCache, folder: Path):
        super().__init__(cache, folder)
        self.path, self.index = cache.path, cache.index

    def read(self, i: int) -> Iterable[Tensor]:
        file = self.opened(self.path / shard_name(int(self.index.shard[i])))
        start = int(self.index.row_start[i])
        return [file.get_slice(name)[start : start + int(self.lengths[i])] for name in FIELDS]  # type: ignore[attr-defined]


class PerSample(Peer):
    def write(self, cache: FeatureCache) -> None:
        for i in range(len(cache)):
            save_file(sample_tensors(cache, i), self.folder / f"{i}.safetensors")

    def read(self, i: int) -> Iterable[Tensor]:
        tensors = load_file(self.folder / f"{i}.safetensors")
        return [tensors[name] for name in FIELDS]


class TorchSave(Peer):
    def write(self, cache: FeatureCache) -> None:
        for i in range(len(cache)):
            torch.save(sample_tensors(cache, i), self.folder / f"{i}.pt")

    def read(self, i: int) -> Iterable[Tensor]:
        tensors = torch.load(self.folder / f"{i}.pt", weights_only=True)
        return [tensors[name] for name in FIELDS]


class Padded(Peer):
    def write(self, cache: FeatureCache) -> None:
        longest = int(cache.index.num_tokens.max())
        for first in range(0, len(cache), SAMPLES_A_PADDED_SHARD):
            numbers = range(first, min(first + SAMPLES_A_PADDED_SHARD, len(cache)))
            shard: dict[str, Tensor] = {}
            for row, i in enumerate(numbers):
                for name, tensor in sample_tensors(cache, i).items():
                    whole = shard.setdefault(
                        name, torch.zeros(len(numbers), longest, *tensor.shape[1:], dtype=tensor.dtype)
                    )
                    whole[row, : len(tensor)] = tensor
            save_file(shard, self.folder / f"{first}.safetensors")

    def read(self, i: int) -> Iterable[Tensor]:
        first = i - i % SAMPLES_A_PADDED_SHARD
        file = self.opened(self.folder / f"{first}.safetensors")
        length = int(self.lengths[i])
        return [file.get_slice(name)[i - first][:length] for name in FIELDS]  # type: ignore[attr-defined]


class Mapped(Peer):
    def __init__(self, cache: FeatureCache, folder: Path):
        super().__init__(cache, folder)
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])
        self.width = cache.manifest.width
        self.maps: dict[str, np.ndarray] = {}

    def write(self, cache: FeatureCache) -> None:
        for name in FIELDS:
            with open(self.folder / name, "wb") as file:
                for i in range(len(cache)):
                    file.write(sample_tensors(cache, i)[name].contiguous().view(torch.uint8).numpy().data)

    def read(self, i: int) -> Iterable[Tensor]:
        for name, dtype in zip(FIELDS, (np.uint16, np.int64, np.int64), strict=True):
            if name not in self.maps:
                self.maps[name] = np.memmap(self.folder / name, dtype, "r")
            width = self.width if name == "hidden_states" else 1
            rows = self.maps[name][self.starts[i] * width : self.starts[i + 1] * width].copy()
            flat = torch.from_numpy(rows)
            yield flat.view(torch.bfloat16).view(-1, width) if width > 1 else flat


PEERS: dict[str, type[Peer]] = {
    "safe_open": SafeOpen,
    "per sample": PerSample,
    "torch.save": TorchSave,
    "padded": Padded,
    "mmap": Mapped,
}


def sample_tensors(cache: FeatureCache, i: int) -> dict[str, Tensor]:
    return {name: getattr(cache[i], name)[0].clone() for name in FIELDS}


def place_of(codec: str) -> str:
    """The name of the folder of its cache."""
    return codec.replace(":", "-")


def drain(batches: Iterable[DFlashTargetBatch]) -> None:
    for batch in batches:
        assert batch.hidden_states.shape[2]


def raw_read(cache: Path, memory: np.ndarray | None = None) -> None:
    """Read the shards: into a small buffer a thread, or each byte to its own place in ``memory``."""
    paths = sorted((cache / "shards").iterdir())
    begins = np.cumsum([0, *(path.stat().st_size for path in paths)]).tolist()

    def work(path: Path, begin: int) -> None:
        buffer, offset = np.empty(4 << 20, np.uint8) if memory is None else memory[begin:][: 4 << 20], 0
        fd = os.open(path, os.O_RDONLY)
        while count := os.preadv(fd, [buffer.data], offset):
            offset += count
            if memory is not None:
                buffer = memory[begin + offset :][: 4 << 20]
        os.close(fd)

    with ThreadPoolExecutor(CORES) as pool:
        list(pool.map(work, paths, begins[:-1]))


def padding(cache: FeatureCache, batch_size: int) -> float:
    """The share of an epoch's batches that no token fills."""
    masks = [batch.attention_mask for batch in cache.loader(batch_size, shuffle=True)]
    return 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


def memcpy(threads: int) -> float:
    """GB/s of copying 256 MiB, median of seven."""
    size = 256 << 20
    source, target = torch.ones(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
    parts = list(zip(source.chunk(threads), target.chunk(threads), strict=True))
    with ThreadPoolExecutor(threads) as pool:
        times = [timed(lambda: list(pool.map(lambda pair: pair[1].copy_(pair[0]), parts))) for _ in range(7)]
    return size / statistics.median(times) / 1e9


def timed(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def measure(ways: dict[str, Callable[[], float]], repeat: int) -> dict[str, float]:
    """Median seconds of each way, alternating, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeat + 1):
        for name, way in ways.items():
            seconds[name].append(way())
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def later_epoch(cache: FeatureCache, batch_size: int, threads: int) -> float:
    """Seconds of an epoch whose buffers are there already, as in a training.

    A buffer's pages come when a batch first reaches them, so that a cache of few batches needs some epochs.
    """
    loader = cache.loader(batch_size, shuffle=True, threads=threads)
    for _ in range(4):
        drain(loader)
    return timed(lambda: drain(loader))


def warm_table(cache: FeatureCache, folder: Path, repeat: int) -> None:
    num_bytes = int(cache.index.num_tokens.sum()) * cache.manifest.schema().token_bytes
    order = np.random.default_rng(0).permutation(len(cache)).tolist()
    places = np.zeros(sum(path.stat().st_size for path in (cache.path / "shards").iterdir()) + (4 << 20), np.uint8)
    ways: dict[str, Callable[[], float]] = {
        "raw read": lambda: timed(lambda: raw_read(cache.path)),
        "raw read, places of its own": lambda: timed(lambda: raw_read(cache.path, places)),
    }
    for size in (1, 4, 16):
        for threads in (1, 2, 4):
            ways[f"ours B={size:<2} threads={threads}"] = partial(later_epoch, cache, size, threads)
    for codec in CODECS:
        recode(cache, folder / place_of(codec), codec, threads=CORES)
        for threads in (1, 2, 4):
            recoded = FeatureCache.open(folder / place_of(codec))
            ways[f"ours, {codec}, threads={threads}"] = partial(later_epoch, recoded, 4, threads)
    ways["ours cache[i], no copy"] = lambda: timed(lambda: drain(cache[i] for i in order))
    for name, kind in PEERS.items():
        place = folder / name
        place.mkdir()
        peer = kind(cache, place)
        peer.write(cache)
        for workers in (0, 2):
            batches = DataLoader(peer, batch_size=4, sampler=order, collate_fn=collate, num_workers=workers)
            ways[f"{name} workers={workers}"] = lambda it=batches: timed(lambda: drain(it))  # type: ignore[misc]
    # In turn with the rest: memory's speed changes from minute to minute on a shared machine.
    for threads in (1, CORES):
        ways[f"memcpy threads={threads}"] = lambda threads=threads: num_bytes / memcpy(threads) / 1e9  # type: ignore[misc]
    speed = {name: num_bytes / took / 1e9 for name, took in measure(ways, repeat).items()}
    best_copy = max(value for name, value in speed.items() if name.startswith("memcpy"))
    for name, value in speed.items():
        print(f"{name:28}{value:8.2f} GB/s{value / best_copy:8.0%} of memcpy")
    for size in (1, 4, 16):
        print(f"B={size}: {padding(cache, size):.0%} of a batch is padding")
    ours = max(value for name, value in speed.items() if name.startswith("ours B=4"))
    peer_name, peer_speed = max(
        ((n, v) for n, v in speed.items() if n.split(" workers")[0] in PEERS), key=lambda x: x[1]
    )
    for codec in CODECS:
        best = max(value for name, value in speed.items() if name.startswith(f"ours, {codec},"))
        print(f"B=4, {codec}: {best:.2f} GB/s is {best / peer_speed:.1f}x the best of the others with raw states")
    print(f"B=4: ours {ours:.2f} GB/s is {ours / peer_speed:.1f}x the best of the others ({peer_name})")


def cold_table(folder: Path, repeat: int) -> None:
    """``folder``: what :func:`warm_table` made."""
    cache = FeatureCache.open(folder / "cache")
    num_bytes = int(cache.index.num_tokens.sum()) * cache.manifest.schema().token_bytes
    order = np.random.default_rng(0).permutation(len(cache)).tolist()
    del cache

    def cold(place: str, way: Callable[[], None]) -> float:
        drop_pages(folder / place)
        return timed(way)

    # All are opened anew in each round: pages that a memory map holds would not be dropped.
    def ours(place: str) -> None:
        drain(FeatureCache.open(folder / place).loader(4, shuffle=True))

    def peer(name: str) -> None:
        dataset = PEERS[name](FeatureCache.open(folder / "cache"), folder / name)
        drain(DataLoader(dataset, batch_size=4, sampler=order, collate_fn=collate))

    ways = {"raw read, cold": lambda: cold("cache", lambda: raw_read(folder / "cache"))}
    for place in ("cache", *map(place_of, CODECS)):
        name = "raw" if place == "cache" else place
        ways[f"ours, {name}, cold"] = partial(cold, place, partial(ours, place))
    for name in PEERS:
        ways[f"{name}, cold"] = partial(cold, "cache" if name == "safe_open" else name, partial(peer, name))
    seconds = measure(ways, repeat)
    for name, took in seconds.items():
        print(f"{name:28}{num_bytes / took / 1e9:8.2f} GB/s{seconds['raw read, cold'] / took:8.0%} of the disk")


def index_of(small: Path, folder: Path, count: int) -> Path:
    """A cache whose tables list ``count`` samples; its shards are not there, opening does not look at them."""
    path = folder / f"n{count}"
    write_cache(path, [4] * 8, dtype="bfloat16", hidden=8, target_layer_ids=[0], shard_bytes=64 << 10, states=zeros)
    manifest = Manifest.read(path)
    assert manifest.totals is not None
    a_shard = 1000
    shards = -(-count // a_shard)
    at = np.arange(count)
    index = Index(
        at,
        (at // a_shard).astype(np.int32),
        at % a_shard * 4,
        np.full(count, 4, np.int32),
        np.full(count, 4, np.int32),
        np.zeros(count, np.uint64),
    )
    rows = [
        ShardRow(shard_name(n), min(a_shard, count - n * a_shard), 4 * a_shard, 1, 0, 0, [], []) for n in range(shards)
    ]
    write_index(path / INDEX_NAME, index, manifest.fingerprint)
    write_shards(path / SHARDS_NAME, rows, manifest.fingerprint)
    totals = replace(manifest.totals, samples=count, tokens=4 * count, shards=shards)
    replace(manifest, totals=totals).write(path)
    assert len(read_index(path / INDEX_NAME, manifest.fingerprint)) == count
    return path


def zeros(_sample_id: int, num_tokens: int) -> Tensor:
    return torch.zeros(num_tokens, 8, dtype=torch.bfloat16)


OPEN = """
import sys, time
from cache_format import FeatureCache
def rss():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
FeatureCache.open(sys.argv[2])
before, started = rss(), time.perf_counter()
cache = FeatureCache.open(sys.argv[1])
print((time.perf_counter() - started) * 1e3, rss() - before)
"""


def open_table(folder: Path, repeat: int) -> None:
    small = index_of(folder, folder, 1)
    for count in (10**3, 10**5, 10**7):
        path = index_of(small, folder, count)
        runs = [
            tuple(map(float, subprocess.check_output([sys.executable, "-c", OPEN, path, small]).split()))
            for _ in range(repeat)
        ]
        took, memory = (statistics.median(values) for values in zip(*runs, strict=True))
        print(f"open {count:>12,} samples {took:8.1f} ms{memory:8.1f} MiB more")


def first_batch(cache: Path, repeat: int) -> None:
    times = []
    for _ in range(repeat):
        times.append(timed(lambda: next(iter(FeatureCache.open(cache).loader(4, shuffle=True)))))
    print(f"open and first batch, B=4 {statistics.median(times) * 1e3:8.1f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=2.0, help="size of the cache; it should fit in memory twice")
    parser.add_argument("--hidden-size", type=int, default=1024, help="features of a layer; there are five layers")
    parser.add_argument("--longest", type=int, default=2048, help="tokens of the longest sample")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to make the files (a folder on the disk to measure)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.folder is not None:
        args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        write_large_cache(folder / "cache", args.gib, hidden=args.hidden_size, longest=args.longest)
        cache = FeatureCache.open(folder / "cache")
        tokens = int(cache.index.num_tokens.sum())
        print(f"{len(cache):,} samples, {tokens:,} tokens, {CORES} cores, median of {args.repeat}", flush=True)
        warm_table(cache, folder, args.repeat)
        del cache
        cold_table(folder, args.repeat)
        first_batch(folder / "cache", args.repeat)
        open_table(folder, args.repeat)


if __name__ == "__main__":
    main()
