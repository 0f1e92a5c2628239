"""The folders below one that is written to: checked before anything in them is made or removed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from cache_format.storage.commit import make_folder, remove_temporaries
from cache_format.storage.paths import inside


def begin_folders(root: Path, names: Iterable[str]) -> None:
    """Make ``root`` and the folders ``names`` below it, and remove what killed processes left half-written there.

    Raises:
        CacheError: one of them leads out of ``root`` through a symbolic link; nothing was touched.
        StorageError: the operating system refused.
    """
    # All of them are looked at first: a link would lead both making and removing out of root.
    for path in (root, *[inside(root, name) for name in dict.fromkeys(names)]):
        make_folder(path)
        remove_temporaries(path)
