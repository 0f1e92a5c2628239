"""A shard and the folder of the samples that are symbolic links to themselves."""

from __future__ import annotations

import shutil
from pathlib import Path

from edit import shard


def attack(cache: Path) -> None:
    shutil.rmtree(cache / "samples")
    for path in (shard(cache), cache / "samples"):
        path.unlink(missing_ok=True)
        path.symlink_to(path.name)
