"""A pickle under a shard's name, in the hope that somebody loads it; it would leave a file behind."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

from edit import shard


def attack(cache: Path) -> None:
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(cache.parent / "outside" / "executed"),)

    shard(cache).write_bytes(pickle.dumps(Payload()))
