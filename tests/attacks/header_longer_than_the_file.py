"""A header length past the end of the file."""

from __future__ import annotations

from pathlib import Path

from edit import shard


def attack(cache: Path) -> None:
    path = shard(cache)
    data = path.read_bytes()
    path.write_bytes((len(data) * 2).to_bytes(8, "little") + data[8:])
