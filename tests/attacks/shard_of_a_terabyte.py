"""A sparse shard of 1 TB."""

from __future__ import annotations

import os
from pathlib import Path

from edit import shard


def attack(cache: Path) -> None:
    os.truncate(shard(cache), 1 << 40)
