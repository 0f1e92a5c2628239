"""A hidden size of 2^60: a batch would be larger than any memory."""

from __future__ import annotations

from pathlib import Path

from edit import change_manifest


def attack(cache: Path) -> None:
    change_manifest(cache, lambda content: content["target"].update(hidden_size=1 << 60))
