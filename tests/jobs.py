"""A small extraction for tests: its layers, and a cache's bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cache_format.errors import CacheError
from cache_format.layout.manifest import MANIFEST_NAME, Manifest

LAYER_IDS = [4, 0, 2]


def on(job: Sequence[object], data: Path | str) -> list[object]:
    """``job`` on other data; ``--data`` once more would be another source."""
    at = job.index("--data") + 1
    return [*job[:at], str(data), *job[at + 1 :]]


def contents(cache: Path) -> dict[str, bytes]:
    """Every file below ``cache`` by its relative name, the manifest without the command line that made it."""
    files = {str(p.relative_to(cache)): p.read_bytes() for p in sorted(cache.rglob("*")) if p.is_file()}
    return {name: without_command(name, data) for name, data in files.items()}


def without_command(name: str, data: bytes) -> bytes:
    """A file of a cache, as another command line that gives the same cache would have written it."""
    if name != MANIFEST_NAME:
        return data
    try:
        manifest = Manifest.parse(data, name)
    except CacheError:
        return data
    return data if manifest.to_bytes() != data else replace(manifest, command=None).to_bytes()
