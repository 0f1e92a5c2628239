"""A sparse manifest of 1 TB, to be read whole."""

from __future__ import annotations

import os
from pathlib import Path


def attack(cache: Path) -> None:
    os.truncate(cache / "manifest.json", 1 << 40)
