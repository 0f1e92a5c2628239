"""Folders under the names of files."""

from __future__ import annotations

from pathlib import Path

from edit import shard


def attack(cache: Path) -> None:
    for path in (shard(cache), cache / "index.arrow"):
        path.unlink()
        path.mkdir()
