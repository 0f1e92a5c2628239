"""shards.arrow with a path that leads out of the cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cache_format.layout.index import SHARDS_NAME, read_shards, write_shards
from cache_format.layout.manifest import Manifest


def attack(cache: Path) -> None:
    fingerprint = Manifest.read(cache).fingerprint
    rows = read_shards(cache / SHARDS_NAME, fingerprint)
    rows[0] = replace(rows[0], file="../outside/canary")
    write_shards(cache / SHARDS_NAME, rows, fingerprint)
