"""A valid shard of the same shape from another cache."""

from __future__ import annotations

from pathlib import Path

from edit import shard
from synthetic import write_cache


def attack(cache: Path) -> None:
    write_cache(cache.parent / "outside" / "other", [5, 40, 3, 17, 29, 8, 61, 12], hidden=256, name="other")
    shard(cache).write_bytes(shard(cache.parent / "outside" / "other").read_bytes())
