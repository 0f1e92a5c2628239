"""A small extraction for tests: its layers, and a cache's bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

LAYER_IDS = [4, 0, 2]


def on(job: Sequence[object], data: Path | str) -> list[object]:
    """``job`` on other data; ``--data`` once more would be another source."""
    at = job.index("--data") + 1
    return [*job[:at], str(data), *job[at + 1 :]]


def contents(cache: Path) -> dict[str, bytes]:
    """Every file below ``cache`` by its relative name."""
    return {str(p.relative_to(cache)): p.read_bytes() for p in sorted(cache.rglob("*")) if p.is_file()}
