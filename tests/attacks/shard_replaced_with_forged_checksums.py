"""States exchanged and the sample checksums in the shard recomputed: only the index tells."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from edit import shard

from cache_format.layout.manifest import Manifest
from cache_format.layout.shard_reader import ShardFile


def attack(cache: Path) -> None:
    path, schema = shard(cache), Manifest.read(cache).schema()
    with ShardFile(path, schema, 0) as file:
        offset, size = file.row_range("hidden_states", 0, 1)
        place = file.container.places["sample_checksums"]
    data = bytearray(path.read_bytes())
    data[offset : offset + size] = bytes(size)
    path.write_bytes(bytes(data))
    with ShardFile(path, schema, 0) as file:
        sums = np.array([file.computed_checksum(i) for i in range(file.num_samples)], np.uint64)
    data[place.start : place.stop] = struct.pack(f"<{len(sums)}Q", *sums.tolist())
    path.write_bytes(bytes(data))
