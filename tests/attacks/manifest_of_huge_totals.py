"""Totals of 2^60 samples and shards, to be allocated or looped over."""

from __future__ import annotations

from pathlib import Path

from edit import change_manifest


def attack(cache: Path) -> None:
    change_manifest(cache, lambda content: content["totals"].update(samples=1 << 60, shards=1 << 60, parts=1 << 60))
