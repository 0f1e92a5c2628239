"""follow/: what a writer that keeps a few shards, and readers that follow it, say to each other.

A turn is a shard of an epoch: turn t is shard t % shards of epoch t // shards.
"""

from __future__ import annotations

import json
import re
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cache_format.errors import CacheError, StorageError
from cache_format.storage.commit import committed, make_folder, write_all
from cache_format.storage.paths import inside, open_for_reading

FOLDER = "follow"
_WRITER = f"{FOLDER}/writer.json"
_READER = re.compile(r"reader-([0-9]{1,6})-of-([0-9]{1,6})\.json")
_MAX_BYTES, _MAX_TURN = 4096, 1 << 60


@dataclass(frozen=True, kw_only=True)
class KeptWindow:
    """What the writer of a cache keeps of it."""

    keep: int
    """shards: those of turns ``done`` to ``done + keep - 1``"""
    epochs: int
    """after which it ends"""


def write_window(cache: Path, window: KeptWindow) -> None:
    """Say that the shards of ``cache`` come and go.

    Raises:
        CacheError, StorageError: it cannot be written there.
    """
    _write(cache, _WRITER, asdict(window))


def read_window(cache: Path) -> KeptWindow | None:
    """What the writer keeps; None: every shard.

    Raises:
        CacheError: it is damaged.
    """
    found = _read(cache, _WRITER, ("keep", "epochs"))
    return None if found is None else KeptWindow(**found)


def forget_window(cache: Path) -> None:
    """From now on every shard is kept.

    Raises:
        CacheError, StorageError: the folder leads elsewhere, or cannot be removed.
    """
    folder = inside(cache, FOLDER)
    try:
        if folder.is_dir():
            shutil.rmtree(folder)
    except OSError as error:
        raise StorageError(folder, "remove", error) from error


def write_done(cache: Path, rank: int, world_size: int, done: int) -> None:
    """A reader's word: it needs no shard of a turn before ``done`` any more, but those from there on.

    Raises:
        CacheError, StorageError: it cannot be written there.
    """
    _write(cache, f"{FOLDER}/reader-{rank}-of-{world_size}.json", {"done": done})


def read_done(cache: Path) -> int:
    """The turn that the slowest rank stands at, of those readers that spoke last; 0 where one has not spoken.

    Raises:
        CacheError: a file is damaged.
    """
    spoke: dict[int, dict[int, int]] = {}
    for path in (cache / FOLDER).glob("reader-*-of-*.json"):
        match = _READER.fullmatch(path.name)
        with suppress(FileNotFoundError):
            if match:
                spoke.setdefault(int(match[2]), {})[int(match[1])] = path.stat().st_mtime_ns
    if not spoke:
        return 0
    world = max(spoke, key=lambda size: max(spoke[size].values()))
    if set(spoke[world]) != set(range(world)):
        return 0
    found = [_read(cache, f"{FOLDER}/reader-{rank}-of-{world}.json", ("done",)) for rank in spoke[world]]
    return min(0 if one is None else one["done"] for one in found)


def _write(cache: Path, name: str, content: dict[str, Any]) -> None:
    path = inside(cache, name)
    make_folder(path.parent)
    with committed(path) as file:
        write_all(file, json.dumps(content).encode())


def _read(cache: Path, name: str, fields: tuple[str, ...]) -> dict[str, int] | None:
    path = inside(cache, name)
    if not path.exists():
        return None
    try:
        with open(open_for_reading(path), "rb") as file:
            text = file.read(_MAX_BYTES + 1)
        content = json.loads(text)
        numbers = [content[field] for field in fields]
    except OSError as error:
        raise StorageError(path, "read", error) from error
    except (ValueError, KeyError, TypeError, RecursionError):
        numbers = []
    if not numbers or any(type(number) is not int or not 0 <= number < _MAX_TURN for number in numbers):
        raise CacheError(path, "is damaged; remove it, its writer or reader writes it again")
    return dict(zip(fields, numbers, strict=True))
