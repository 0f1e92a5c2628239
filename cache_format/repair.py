"""repair: set what is damaged aside, never delete it, and leave a cache that ``extract`` can finish.

A damaged or foreign shard goes to quarantine/ and is made again by the cache's ``extract`` command, alone. Tables are
rebuilt from the shards, here or when ``extract`` is done. Damaged samples or target files are set aside too and
prepared again. A damaged manifest is set aside; the same ``extract`` command writes it anew and finds the shards.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

from cache_format.errors import CacheError, StorageError
from cache_format.index import INDEX_NAME, SHARDS_NAME
from cache_format.integrity import Problem
from cache_format.lock import writing
from cache_format.manifest import MANIFEST_NAME, Manifest
from cache_format.seal import seal
from cache_format.storage import inside, is_plain, make_folder, sync_folder

QUARANTINE_NAME = "quarantine"
_TABLES = frozenset({INDEX_NAME, SHARDS_NAME})
LATER_IDENTITY = ("samples", "padding", "attn_implementation")
"""Identity fields that are found out while the samples are prepared and the target is loaded."""


@dataclass(frozen=True, kw_only=True)
class RepairPlan:
    """What :func:`repair` will do."""

    set_aside: list[str] = field(default_factory=list)
    """files below the cache that go to quarantine/"""
    state: str = ""
    """of the manifest afterwards: complete (tables rebuilt), extracting, preparing; '' where there will be none"""

    @property
    def needs_extract(self) -> bool:
        """Whether the cache's ``extract`` command has to be run afterwards."""
        return self.state != "complete"


def plan_repair(cache: Path, problems: Iterable[Problem]) -> RepairPlan:
    """What mends ``problems``, as :func:`cache_format.integrity.verify` (not the quick one) found them."""
    problems = list(problems)
    named = {problem.file for problem in problems}
    tables = [name for name in sorted(_TABLES) if os.path.lexists(cache / name)]
    try:
        manifest = Manifest.read(cache)
    except CacheError:
        return RepairPlan(set_aside=[*tables, MANIFEST_NAME])
    lost_shards = any(problem.file.startswith("shards/") and problem.shard is not None for problem in problems)
    unprepared = any(name.startswith(("samples", "target/")) for name in named)
    state = manifest.state
    if unprepared:
        state = "preparing"
    elif lost_shards and state == "complete":
        state = "extracting"
    aside = {name for name in named if name.startswith(("shards/", "samples/", "target/"))}
    if "samples" in named:
        aside |= {f"samples/{path.name}" for path in (cache / "samples").glob("*.arrow")}
    aside |= named.intersection(tables) if state == "complete" else set(tables)
    return RepairPlan(set_aside=sorted({entry for name in aside if (entry := _own_entry(cache, name))}), state=state)


def _own_entry(cache: Path, name: str) -> str | None:
    """What of ``name`` may be moved: the file, or the first symbolic link on the way to it; never a file outside."""
    try:
        inside(cache, name)
    except CacheError:
        parts = name.split("/")
        ways = ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]
        return next((way for way in ways if (cache / way).is_symlink()), None) if is_plain(name) else None
    return name if os.path.lexists(cache / name) else None


def repair(cache: Path, plan: RepairPlan) -> None:
    """Carry out ``plan``: move files to quarantine/, then write the manifest (and the tables, if all shards are there).

    Killed at any instant, it can be run again: the manifest changes last.

    Raises:
        CacheError: quarantine/ leads out of the cache.
        LockedError: the cache is being written.
        StorageError: the operating system refused.
    """
    with writing(cache):
        for name in plan.set_aside:
            _set_aside(cache, name)
        if not plan.state:
            return
        manifest = Manifest.read(cache)
        files = {name: info for name, info in manifest.files.items() if name not in _TABLES}
        if plan.state == "complete":
            seal(cache, replace(manifest, files=files))
        elif plan.state == "extracting":
            replace(manifest, state="extracting", files=files, quarantined=[], measured=None).write(cache)
        else:
            identity = {name: value for name, value in manifest.identity.items() if name not in LATER_IDENTITY}
            nothing: dict[str, Any] = {
                "fingerprint": "",
                "data": None,
                "totals": None,
                "quarantined": [],
                "measured": None,
                "files": {},
            }
            replace(manifest, state="preparing", identity=identity, **nothing).write(cache)


def _set_aside(cache: Path, name: str) -> None:
    aside = inside(cache, f"{QUARANTINE_NAME}/{name.replace('/', '--')}")
    make_folder(aside.parent)
    tries = (aside.with_name(f"{aside.name}.{n}" if n else aside.name) for n in count())
    aside = next(path for path in tries if not os.path.lexists(path))
    try:
        os.rename(cache / name, aside)
        sync_folder(aside.parent)
        sync_folder((cache / name).parent)
    except OSError as error:
        raise StorageError(cache / name, f"move to {QUARANTINE_NAME}/", error) from error
