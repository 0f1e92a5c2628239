"""A tensor that begins before the data."""

from __future__ import annotations

from pathlib import Path

from edit import change_header, shard


def attack(cache: Path) -> None:
    def before(header: dict) -> None:
        first, last = header["hidden_states"]["data_offsets"]
        header["hidden_states"]["data_offsets"] = [first - 4096, last - 4096]

    change_header(shard(cache), before)
