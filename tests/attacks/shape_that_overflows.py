"""A shape whose product wraps around 64 bits to the right size."""

from __future__ import annotations

from pathlib import Path

from edit import change_header, shard


def attack(cache: Path) -> None:
    def wrap(header: dict) -> None:
        header["input_ids"]["shape"] = [1 << 33, (1 << 31) + header["input_ids"]["shape"][0]]

    change_header(shard(cache), wrap)
