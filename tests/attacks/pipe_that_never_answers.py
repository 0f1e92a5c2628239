"""A named pipe as manifest, index and shard: opening it would wait for ever."""

from __future__ import annotations

import os
from pathlib import Path

from edit import shard


def attack(cache: Path) -> None:
    for path in (shard(cache), cache / "index.arrow", cache / "manifest.json"):
        path.unlink()
        os.mkfifo(path)
