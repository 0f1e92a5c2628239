"""A JSON bomb: a hundred thousand lists in each other, to exhaust the parser's stack."""

from __future__ import annotations

from pathlib import Path

from edit import change_header, shard


def attack(cache: Path) -> None:
    change_header(shard(cache), lambda header: "[" * 100_000 + "]" * 100_000)
