"""NaN, negative and fractional numbers, strings and booleans where sizes are expected."""

from __future__ import annotations

from pathlib import Path

from edit import change_header, shard


def attack(cache: Path) -> None:
    def odd(header: dict) -> None:
        header["hidden_states"]["shape"] = [float("nan"), -1, 2.5, "3", True, None]

    change_header(shard(cache), odd)
