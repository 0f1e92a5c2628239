"""A file that ends inside its header."""

from __future__ import annotations

from pathlib import Path

from edit import shard


def attack(cache: Path) -> None:
    path = shard(cache)
    path.write_bytes(path.read_bytes()[:100])
