"""As many bytes under another shape: rows would be cut at the wrong places."""

from __future__ import annotations

from pathlib import Path

from edit import change_header, shard


def attack(cache: Path) -> None:
    def lie(header: dict) -> None:
        rows, width = header["hidden_states"]["shape"]
        header["hidden_states"]["shape"] = [rows * 2, width // 2]

    change_header(shard(cache), lie)
