"""An index row that points behind the end of its shard."""

from __future__ import annotations

from pathlib import Path

from edit import change_index


def attack(cache: Path) -> None:
    change_index(cache, row_start=lambda column: column + (1 << 40))
