"""A quarantined sample_id that fits no integer of numpy."""

from __future__ import annotations

from pathlib import Path

from edit import change_manifest


def attack(cache: Path) -> None:
    change_manifest(cache, lambda content: content["quarantined"].append(1 << 80))
