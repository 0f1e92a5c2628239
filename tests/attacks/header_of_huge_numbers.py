"""Numbers of a hundred thousand digits, which take a parser minutes, or overflow."""

from __future__ import annotations

from pathlib import Path

from edit import change_header, shard


def attack(cache: Path) -> None:
    change_header(
        shard(cache), lambda header: '{"a":{"dtype":"F32","shape":[' + "9" * 100_000 + '],"data_offsets":[0,4]}}'
    )
