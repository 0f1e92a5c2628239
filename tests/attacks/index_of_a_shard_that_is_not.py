"""A shard number far outside of the cache."""

from __future__ import annotations

from pathlib import Path

from edit import change_index


def attack(cache: Path) -> None:
    change_index(cache, shard=lambda column: column * 0 + 2_000_000_000)
