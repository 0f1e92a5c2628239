"""The state of a long verification: which shards were found right, so that the same command goes on after a kill.

A folder of JSON files, one a worker: ``checked-3.json`` is that of rank 3. A worker rewrites its own, atomically, and
reads all of them when it begins. They belong to one cache: its place and its manifest.json to the byte. A shard counts
as checked only while its size and time (or what a store says of it) are what they were.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from cache_format.errors import CacheError, InputError, MismatchError, StorageError
from cache_format.layout.manifest import Manifest
from cache_format.storage.commit import committed, make_folder, write_all
from cache_format.storage.paths import open_for_reading
from cache_format.storage.store import is_url

_FORMAT = "dflash-cache verify state 1"
_MAX_BYTES = 256 << 20
_SECONDS_BETWEEN, _SHARE_OF_TIME = 0.5, 20
"""It is written at most this often, and takes at most a twentieth of the time."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A shard that an earlier run found right."""

    stamp: str
    samples: int
    bytes: int


def state_folder(cache: Path | str) -> Path:
    """Where the state of a cache's verification lies unless it is said: in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    name = hashlib.sha256(_place(cache).encode()).hexdigest()[:16]
    return Path(base).expanduser() / "dflash-cache" / "verify" / name


def _place(cache: Path | str) -> str:
    return cache if isinstance(cache, str) and is_url(cache) else str(Path(cache).resolve())


class VerifyState:
    """What one worker has checked so far, and what all had checked when it began."""

    def __init__(self, folder: Path, cache: Path | str, manifest: Manifest, rank: int):
        """Read the state in ``folder``, if there is any.

        Raises:
            MismatchError: it is of another cache, or of this one before it was changed.
            InputError: a file there is no such state.
            StorageError: the operating system refused.
        """
        self.folder = folder
        self._path = folder / f"checked-{rank}.json"
        self._belongs = {"cache": _place(cache), "manifest": xxhash.xxh3_64_hexdigest(manifest.to_bytes())}
        self._now = int(time.time())
        self.since = self._now
        """Unix time of the earliest check that is taken over"""
        self._others: dict[int, Seen] = {}
        self._mine: dict[int, Seen] = {}
        for path in self._files():
            self._take(path)
        self._written, self._took = time.monotonic(), 0.0
        self.save(done=False)

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("checked-*.json"))

    def _take(self, path: Path) -> None:
        content = _read(path)
        if content is None:
            return
        _require_own(path, content, self._belongs)
        self.since = min(self.since, content["since"])
        found = self._mine if path == self._path else self._others
        found |= content["shards"]

    def found_right(self, stamps: Mapping[int, str]) -> dict[int, Seen]:
        """Those of the shards in ``stamps`` that earlier runs found right, and that are still the same files."""
        known = self._others | self._mine
        return {n: seen for n, stamp in stamps.items() if (seen := known.get(n)) and seen.stamp == stamp}

    def add(self, number: int, seen: Seen) -> None:
        """A shard was found right. Written now and then; :meth:`save` at the end."""
        self._mine[number] = seen
        if time.monotonic() - self._written > max(_SECONDS_BETWEEN, _SHARE_OF_TIME * self._took):
            self.try_to_save(done=False)

    def try_to_save(self, *, done: bool) -> None:
        """As :meth:`save`, but a folder that takes it no more ends no verification: less can be gone on with."""
        try:
            self.save(done=done)
        except StorageError as error:
            warnings.warn(f"what is found right cannot be kept: {error}", stacklevel=2)

    def save(self, *, done: bool) -> None:
        """Commit this worker's file. ``done``: its share is checked, and nothing was wrong.

        Raises:
            StorageError: the operating system refused; the file is as before.
        """
        began = time.monotonic()
        shards = {str(n): [seen.stamp, seen.samples, seen.bytes] for n, seen in sorted(self._mine.items())}
        content = {"format": _FORMAT, **self._belongs, "since": self.since, "done": done, "shards": shards}
        make_folder(self.folder)
        with committed(self._path) as file:
            write_all(file, json.dumps(content).encode())
        self._written = time.monotonic()
        self._took = self._written - began

    def end(self, chosen: list[int], world_size: int) -> bool:
        """Remove the state if every worker is done and all ``chosen`` shards are checked, so that the next begins anew.

        Returns:
            whether that is so.
        """
        checked: set[int] = set()
        for path in self._files():
            content = _read(path)
            if content is None:
                continue
            rank = path.stem.removeprefix("checked-")
            if not content["done"] and rank.isdigit() and int(rank) < world_size:
                return False
            checked |= set(content["shards"])
        if not checked.issuperset(chosen):
            return False
        # A file that stays says what is true; the next run takes it over.
        with suppress(OSError):
            for path in self._files():
                path.unlink(missing_ok=True)
            self.folder.rmdir()
        return True


def _require_own(path: Path, content: Mapping[str, Any], belongs: Mapping[str, str]) -> None:
    different = {name: (content[name], value) for name, value in belongs.items() if content[name] != value}
    if different:
        raise MismatchError(
            f"{path}: is the state of another cache's verification, or of this cache before it was changed. Different:",
            different,
            f"Remove {path.parent} to begin anew, or name another folder with --state.",
        )


def _read(path: Path) -> dict[str, Any] | None:
    """A state file, checked; None where another worker has just removed it.

    Raises:
        InputError: it is damaged, or something else.
        StorageError: the operating system refused.
    """
    try:
        with open(open_for_reading(path), "rb") as file:
            content = json.loads(file.read(_MAX_BYTES))
        if content["format"] != _FORMAT or type(content["since"]) is not int or type(content["done"]) is not bool:
            raise ValueError
        content["shards"] = {
            int(number): Seen(str(stamp), int(samples), int(size))
            for number, (stamp, samples, size) in content["shards"].items()
        }
        return {name: content[name] for name in ("cache", "manifest", "since", "done", "shards")}
    except OSError as error:
        raise StorageError(path, "read", error) from error
    except (CacheError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        if not os.path.lexists(path):
            return None
        raise InputError(f"{path}: is not the state of a verification; remove {path.parent} to begin anew") from None
