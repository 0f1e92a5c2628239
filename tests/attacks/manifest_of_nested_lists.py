"""A JSON bomb as manifest."""

from __future__ import annotations

from pathlib import Path


def attack(cache: Path) -> None:
    (cache / "manifest.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
