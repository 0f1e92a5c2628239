"""Two whole, valid shards under each other's names."""

from __future__ import annotations

import os
from pathlib import Path

from edit import shard


def attack(cache: Path) -> None:
    os.rename(shard(cache, 0), cache / "aside")
    os.rename(shard(cache, 1), shard(cache, 0))
    os.rename(cache / "aside", shard(cache, 1))
