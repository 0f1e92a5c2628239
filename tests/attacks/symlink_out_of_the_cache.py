"""A shard that is a symbolic link to a file outside."""

from __future__ import annotations

from pathlib import Path

from edit import shard


def attack(cache: Path) -> None:
    path = shard(cache)
    outside = cache.parent / "outside" / "canary"
    outside.write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(outside)
