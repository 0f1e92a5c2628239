"""How fast is a shard written, against `save_file` and against the disk itself?

    python scripts/bench_write.py --mib 512

In one run, alternating, the same bytes (one shard of Qwen3-8B's width in bfloat16). Processor seconds are those of
this process and of the kernel for it; while a target runs on the same cores they are taken from it.
  disk          one sequential write past the page cache of as many bytes from memory, then fsync: the physical limit
  page cache    the same through the page cache, as most programs write
  save_file     safetensors.torch.save_file of the same tensors, then fsync of file and folder: as durable
  ours          ShardBuffer.commit: every sample's checksum, temporary file, write, fsync, rename, fsync of the folder
  no checksums  the same commit without computing checksums: what they cost
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from cache_format.codecs import RawCodec, States
from cache_format.layout.shard_layout import ShardSchema
from cache_format.storage.commit import committed, sync_folder, write_all
from cache_format.storage.direct_write import write_direct
from cache_format.writing.shard_buffer import ShardBuffer

WIDTH = 5 * 4096


def fill(mib: int) -> ShardBuffer:
    schema = ShardSchema(fingerprint="0" * 64, codec=RawCodec(), states=States(torch.bfloat16, 1, WIDTH))
    lengths = np.clip(np.random.default_rng(0).lognormal(6.3, 0.8, 10_000), 16, 4096).astype(np.int64)
    lengths = lengths[np.cumsum(lengths) * schema.token_bytes < mib << 20]
    buffer = ShardBuffer(schema.layout(0, len(lengths), int(lengths.sum())).num_bytes)
    buffer.begin(schema, 0, np.arange(len(lengths)), lengths)
    states = buffer.tensor("hidden_states")
    states.copy_(torch.randn(64, WIDTH).to(torch.bfloat16).repeat(len(states) // 64 + 1, 1)[: len(states)])
    for name in ("input_ids", "loss_mask"):
        buffer.tensor(name).zero_()
    return buffer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=512, help="size of the shard")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where to write (a folder on the disk to measure)")
    args = parser.parse_args()
    buffer = fill(args.mib)
    assert buffer.container is not None
    num_bytes = buffer.container.num_bytes
    data = buffer._memory[:num_bytes].numpy()
    tensors = {name: buffer.tensor(name) for name in buffer.container.places}

    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "out"

        def disk() -> None:
            with open(path, "wb", buffering=0) as file:
                write_direct(file, data)
                os.fsync(file.fileno())

        def page_cache() -> None:
            with open(path, "wb", buffering=0) as file:
                write_all(file, data.data)
                os.fsync(file.fileno())

        def library() -> None:
            save_file(tensors, path)
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            sync_folder(path.parent)

        def ours() -> None:
            buffer.commit(path)

        def no_checksums() -> None:
            with committed(path) as file:
                write_direct(file, data)

        ways: dict[str, Callable[[], None]] = {
            "disk": disk,
            "page cache": page_cache,
            "save_file": library,
            "ours": ours,
            "no checksums": no_checksums,
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        processor: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(args.repeat):
            for name, way in ways.items():
                path.unlink(missing_ok=True)
                started, busy = time.perf_counter(), time.process_time()
                way()
                seconds[name].append(time.perf_counter() - started)
                processor[name].append(time.process_time() - busy)
        speed = {name: num_bytes / statistics.median(values) / 1e9 for name, values in seconds.items()}
        print(f"{num_bytes / 2**20:.0f} MiB, median of {args.repeat}")
        print(f"{'':14}{'GB/s':>8}{'of disk':>10}{'of save_file':>14}{'processor s/GB':>16}")
        for name, value in speed.items():
            busy = statistics.median(processor[name]) / num_bytes * 1e9
            print(f"{name:14}{value:8.2f}{value / speed['disk']:10.0%}{value / speed['save_file']:14.0%}{busy:16.2f}")


if __name__ == "__main__":
    main()
