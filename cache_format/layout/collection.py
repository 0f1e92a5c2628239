"""collection.json: caches that lie side by side and are read as one."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache_format.errors import CacheError, InputError, StorageError
from cache_format.layout.manifest import MANIFEST_NAME, Manifest
from cache_format.storage.commit import committed, write_all
from cache_format.storage.lock import in_turn
from cache_format.storage.paths import inside, open_for_reading

COLLECTION_NAME = "collection.json"
FORMAT_NAME, FORMAT_VERSION = "dflash-cache-collection", 1
MAX_BYTES = 16 << 20
_PATHLIKE = {"/", "\\", "\0"}


@dataclass(frozen=True, slots=True)
class Member:
    """A cache of a collection."""

    name: str
    """its folder, beside collection.json"""
    fingerprint: str
    """of its manifest: another cache that was put in its place is told by it"""

    def __post_init__(self) -> None:
        named = isinstance(self.name, str) and self.name not in ("", ".", "..") and not set(self.name) & _PATHLIKE
        if not named or not re.fullmatch(r"[0-9a-f]{64}", str(self.fingerprint)):
            raise ValueError("each cache is the name of a folder beside it, and a fingerprint")


def collection_at(place: str | os.PathLike[str]) -> list[Path] | None:
    """The folders of the caches, where ``place`` is a collection.json or a folder with one; None: it is not.

    Raises:
        CacheError: it is damaged, or a cache is missing or another one than it was.
    """
    listed = listed_at(place)
    return None if listed is None else [_checked(path, member) for path, member in listed]


def listed_at(place: str | os.PathLike[str]) -> list[tuple[Path, Member]] | None:
    """As :func:`collection_at`, with their entries and without a look at the caches.

    Raises:
        CacheError: it is damaged, or leads elsewhere.
    """
    path = Path(place)
    if path.is_dir() and not (path / MANIFEST_NAME).exists():
        path = path / COLLECTION_NAME
    if path.suffix != ".json" or not path.is_file():
        return None
    return [(inside(path.parent, member.name), member) for member in read_collection(path)]


def read_collection(path: Path) -> list[Member]:
    """What a collection.json lists.

    Raises:
        CacheError: it is damaged or foreign.
        StorageError: the operating system refused.
    """
    try:
        with open(open_for_reading(path), "rb") as file:
            text = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise StorageError(path, "read", error) from error
    try:
        content: Any = json.loads(text) if len(text) <= MAX_BYTES else None
        if not isinstance(content, dict) or content.get("format") != FORMAT_NAME:
            raise ValueError(f"it does not say that it is of format {FORMAT_NAME!r}")
        if content.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"format version {content.get('format_version')!r}; this package reads {FORMAT_VERSION}")
        members = [Member(**entry) for entry in content["caches"]]
        if not members or len({member.name for member in members}) < len(members):
            raise ValueError("it lists no cache, or one twice")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CacheError(path, f"is damaged or foreign: {error}") from None
    return members


def write_collection(path: Path, members: Sequence[Member]) -> None:
    """Commit a collection.json.

    Raises:
        StorageError: the operating system refused; the old one stands.
    """
    caches = [{"name": member.name, "fingerprint": member.fingerprint} for member in members]
    content = {"format": FORMAT_NAME, "format_version": FORMAT_VERSION, "caches": caches}
    with committed(path) as file:
        write_all(file, json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n")


@contextmanager
def changing(path: Path) -> Iterator[None]:
    """Keep others from changing a collection.json, waiting for them: what it lists is read, added to, and written.

    Raises:
        LockedError: another process has held it for a minute.
        StorageError: the operating system refused.
    """
    with in_turn(path.parent, f".{path.name}.lock"):
        yield


def member(cache: Path, collection: Path) -> Member:
    """The entry of a cache.

    Raises:
        InputError: it does not lie beside the collection.
        CacheError: it is not a cache.
    """
    if os.path.abspath(cache.parent) != os.path.abspath(collection.parent):
        raise InputError(f"{cache}: a collection lists caches beside it; {collection} lies in another folder")
    return Member(cache.name, Manifest.read(cache).fingerprint)


def _checked(path: Path, member: Member) -> Path:
    found = Manifest.read(path).fingerprint
    if found != member.fingerprint:
        raise CacheError(path, f"is not the cache that {COLLECTION_NAME} lists: its fingerprint is another")
    return path
