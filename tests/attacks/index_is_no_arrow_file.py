"""Text under the name of the index."""

from __future__ import annotations

from pathlib import Path


def attack(cache: Path) -> None:
    (cache / "index.arrow").write_text("sample_id,shard\n0,0\n" * 1000)
