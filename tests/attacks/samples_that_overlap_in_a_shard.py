"""cu_seqlens that go backwards: two samples over the same rows, one of negative length."""

from __future__ import annotations

import struct
from pathlib import Path

from edit import shard


def attack(cache: Path) -> None:
    path = shard(cache)
    data = bytearray(path.read_bytes())
    start = 8 + struct.unpack("<Q", data[:8])[0]
    data[start + 8 : start + 16] = struct.pack("<q", 1 << 40)
    path.write_bytes(bytes(data))
