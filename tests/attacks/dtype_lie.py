"""The same bytes under another dtype of the same width."""

from __future__ import annotations

from pathlib import Path

from edit import change_header, shard


def attack(cache: Path) -> None:
    def lie(header: dict) -> None:
        header["hidden_states"]["dtype"] = "I32"

    change_header(shard(cache), lie)
