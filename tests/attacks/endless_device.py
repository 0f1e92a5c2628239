"""A shard that is /dev/zero, which never ends."""

from __future__ import annotations

from pathlib import Path

from edit import shard


def attack(cache: Path) -> None:
    path = shard(cache)
    path.unlink()
    path.symlink_to("/dev/zero")
