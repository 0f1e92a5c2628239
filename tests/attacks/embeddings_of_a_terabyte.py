"""Sparse embeddings of 1 TB, to be read or hashed whole."""

from __future__ import annotations

import os
from pathlib import Path


def attack(cache: Path) -> None:
    os.truncate(cache / "target" / "embeddings.safetensors", 1 << 40)
