"""A codec of which the reader knows nothing."""

from __future__ import annotations

from pathlib import Path

from edit import change_manifest


def attack(cache: Path) -> None:
    change_manifest(cache, lambda content: content.update(codec={"name": "pickle", "module": "os"}))
