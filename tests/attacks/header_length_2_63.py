"""A shard whose header claims 2^63 bytes, to make the reader allocate them."""

from __future__ import annotations

from pathlib import Path

from edit import shard


def attack(cache: Path) -> None:
    path = shard(cache)
    path.write_bytes((1 << 63).to_bytes(8, "little") + path.read_bytes()[8:])
