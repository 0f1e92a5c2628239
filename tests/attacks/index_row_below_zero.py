"""Negative rows and lengths, which Python would count from the end."""

from __future__ import annotations

from pathlib import Path

from edit import change_index


def attack(cache: Path) -> None:
    change_index(cache, row_start=lambda column: column - 1000, num_tokens=lambda column: -column)
