"""shards/ itself is a symbolic link to a folder outside."""

from __future__ import annotations

from pathlib import Path


def attack(cache: Path) -> None:
    (cache / "shards").rename(cache.parent / "outside" / "shards")
    (cache / "shards").symlink_to(cache.parent / "outside" / "shards")
