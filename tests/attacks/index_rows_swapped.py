"""Two samples of equal length exchanged in the index: right checksums, wrong sample."""

from __future__ import annotations

from pathlib import Path

from edit import change_index


def attack(cache: Path) -> None:
    change_index(cache, row_start=lambda column: column[::-1], shard=lambda column: column[::-1])
