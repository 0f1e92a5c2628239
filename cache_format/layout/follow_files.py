"""follow/: what a writer that keeps a few shards, and readers that follow it, say to each other.

A turn is a shard of an epoch: turn t is shard t % shards of epoch t // shards.
"""

from __future__ import annotations

import errno
import json
import os
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
_TRIES = 10
"""To make or remove what another process removes or makes at the same moment."""


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
    for tries_left in reversed(range(_TRIES)):
        try:
            if folder.is_dir():
                shutil.rmtree(folder)
            return
        except OSError as error:
            # A reader may write its word meanwhile.
            if error.errno not in (errno.ENOTEMPTY, errno.ENOENT) or not tries_left:
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
    names: list[str] = []
    with suppress(FileNotFoundError, NotADirectoryError):
        names = os.listdir(cache / FOLDER)
    for match in filter(None, map(_READER.fullmatch, names)):
        with suppress(FileNotFoundError):
            spoke.setdefault(int(match[2]), {})[int(match[1])] = (cache / FOLDER / match[0]).stat().st_mtime_ns
    if not spoke:
        return 0
    world = max(spoke, key=lambda size: max(spoke[size].values()))
    if set(spoke[world]) != set(range(world)):
        return 0
    found = [_read(cache, f"{FOLDER}/reader-{rank}-of-{world}.json", ("done",)) for rank in spoke[world]]
    return min(0 if one is None else one["done"] for one in found)


def _write(cache: Path, name: str, content: dict[str, Any]) -> None:
    path = inside(cache, name)
    for tries_left in reversed(range(_TRIES)):
        make_folder(path.parent)
        try:
            with committed(path) as file:
                write_all(file, json.dumps(content).encode())
        except StorageError as error:
            # Another one may have forgotten the window, and its folder with it.
            if not isinstance(error.__cause__, FileNotFoundError) or not tries_left:
                raise
        else:
            return


def _read(cache: Path, name: str, fields: tuple[str, ...]) -> dict[str, int] | None:
    path = inside(cache, name)
    try:
        text = _text(path)
        if text is None:
            return None
        content = json.loads(text)
        numbers = [content[field] for field in fields]
    except OSError as error:
        raise StorageError(path, "read", error) from error
    except (ValueError, KeyError, TypeError, RecursionError):
        numbers = []
    if not numbers or any(type(number) is not int or not 0 <= number < _MAX_TURN for number in numbers):
        raise CacheError(path, "is damaged; remove it, its writer or reader writes it again")
    return dict(zip(fields, numbers, strict=True))


def _text(path: Path) -> bytes | None:
    """None: there is no such file."""
    for tries_left in reversed(range(_TRIES)):
        try:
            with open(open_for_reading(path), "rb") as file:
                return file.read(_MAX_BYTES + 1)
        except CacheError:
            if not os.path.lexists(path):
                return None
            # It may have come since; one that is no file stays.
            if not tries_left:
                raise
    return None
