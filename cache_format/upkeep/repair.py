"""repair: set what is damaged aside, never delete it, and leave a cache that ``extract`` can finish.

A damaged or foreign shard goes to quarantine/ and is made again by the cache's ``extract`` command, alone. Tables are
rebuilt from the shards, here or when ``extract`` is done. Damaged samples or target files are set aside too and
prepared again. A damaged manifest is set aside; the same ``extract`` command writes it anew and finds the shards.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

from cache_format.errors import CacheError, InputError, StorageError
from cache_format.layout.index import INDEX_NAME, SHARDS_NAME
from cache_format.layout.manifest import LATER_IDENTITY, MANIFEST_NAME, Manifest
from cache_format.layout.shard_layout import finished_shards
from cache_format.storage.commit import make_folder, sync_folder
from cache_format.storage.folder import Folder, StoreFolder, open_folder
from cache_format.storage.lease import leased
from cache_format.storage.lock import writing
from cache_format.storage.paths import inside, is_plain
from cache_format.storage.store import Store, is_url
from cache_format.upkeep.problem import Problem
from cache_format.writing.seal import seal
from cache_format.writing.upload import Upload

QUARANTINE_NAME = "quarantine"
_TABLES = frozenset({INDEX_NAME, SHARDS_NAME})


@dataclass(frozen=True, kw_only=True)
class RepairPlan:
    """What :func:`repair` will do."""

    set_aside: list[str] = field(default_factory=list)
    """files below the cache that go to quarantine/"""
    state: str = ""
    """of the manifest afterwards: complete (tables rebuilt), extracting, preparing; '' where there will be none"""
    seen: dict[str, str] = field(default_factory=dict)
    """stamps of the manifest and of what is set aside; '' where there was no such file"""

    @property
    def needs_extract(self) -> bool:
        """Whether the cache's ``extract`` command has to be run afterwards."""
        return self.state != "complete"


def plan_repair(cache: Path | str, problems: Iterable[Problem], stamps: Mapping[str, str] | None = None) -> RepairPlan:
    """What mends ``problems``, as :func:`cache_format.upkeep.verify.verify` (not the quick one) found them.

    ``stamps`` are those of the cache's folder before that was begun; None: those of now.

    Raises:
        InputError: it is no cache, nor what is left of one.
    """
    problems = list(problems)
    named = {problem.file for problem in problems}
    folder = open_folder(cache)
    stamps = folder.stamps() if stamps is None else stamps
    tables = [name for name in sorted(_TABLES) if _is_there(folder, name)]
    try:
        folder.local(MANIFEST_NAME)
        manifest = Manifest.read(folder.path)
    except CacheError:
        _require_remains(folder)
        return _seen(RepairPlan(set_aside=[*tables, MANIFEST_NAME]), stamps)
    lost_shards = any(problem.file.startswith("shards/") and problem.shard is not None for problem in problems)
    unprepared = any(name.startswith(("samples", "target/")) for name in named)
    state = manifest.state
    if unprepared:
        state = "preparing"
    elif lost_shards and state == "complete":
        state = "extracting"
    aside = {name for name in named if name.startswith(("shards/", "samples/", "target/"))}
    if "samples" in named:
        aside |= {f"samples/{name}" for name in folder.names("samples") if name.endswith(".arrow")}
    aside |= named.intersection(tables) if state == "complete" else set(tables)
    entries = sorted({entry for name in aside if (entry := _own_entry(folder, name))})
    return _seen(RepairPlan(set_aside=entries, state=state), stamps)


def _seen(plan: RepairPlan, stamps: Mapping[str, str]) -> RepairPlan:
    return replace(plan, seen={name: stamps.get(name, "") for name in (MANIFEST_NAME, *plan.set_aside)})


def _seen_again(folder: Folder, plan: RepairPlan) -> dict[str, str]:
    """The stamps of now, if the plan is still one for what is there: a cache is verified for hours, or somebody asked.

    Raises:
        InputError: a file was written or moved since.
    """
    now = folder.stamps()
    changed = sorted(name for name, stamp in plan.seen.items() if now.get(name, "") != stamp)
    if changed:
        raise InputError(
            f"{folder.where}: {changed[0]} changed while this repair looked at the cache, or waited for an answer "
            "(another repair? its extract?); nothing was touched. Run repair again"
        )
    return now


def _require_remains(folder: Folder) -> None:
    """Whether a folder whose manifest.json cannot be read was a cache: others have a file of that name too.

    Raises:
        InputError: nothing says so.
    """
    parts = [name for name in folder.names("samples") if name.startswith("samples-") and name.endswith(".arrow")]
    if not parts and not finished_shards(folder.names("shards")):
        raise InputError(
            f"{folder.where}: holds neither samples nor shards of a cache, and its {MANIFEST_NAME} is not one of ours; "
            "nothing was touched"
        )


def command_of(cache: Path | str) -> str:
    """The command that made ``cache``, as a shell takes it, for a person who is to run it again."""
    folder = open_folder(cache)
    try:
        folder.local(MANIFEST_NAME)
        command = Manifest.read(folder.path).command
    except CacheError:
        command = None
    if command is None:
        return f"the extract command of {cache}"
    place = str(cache) if isinstance(cache, str) and is_url(cache) else os.path.abspath(cache)
    known = {*command.arguments, *command.paths.values()}
    moved = "" if place in known else f" (with {place} in place of the OUT of then)"
    return command.shell() + moved


def _is_there(folder: Folder, name: str) -> bool:
    return name in folder.listing if isinstance(folder, StoreFolder) else os.path.lexists(folder.path / name)


def _own_entry(folder: Folder, name: str) -> str | None:
    """What of ``name`` may be moved: the file, or the first symbolic link on the way to it; never a file outside."""
    if isinstance(folder, StoreFolder):
        return name if is_plain(name) and _is_there(folder, name) else None
    cache = folder.path
    try:
        inside(cache, name)
    except CacheError:
        parts = name.split("/")
        ways = ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]
        return next((way for way in ways if (cache / way).is_symlink()), None) if is_plain(name) else None
    return name if os.path.lexists(cache / name) else None


def repair(cache: Path | str, plan: RepairPlan) -> None:
    """Carry out ``plan``: move files to quarantine/, then write the manifest (and the tables, if all shards are there).

    Killed at any instant, it can be run again: the manifest changes last.

    Raises:
        CacheError: quarantine/ leads out of the cache.
        InputError: what was planned for has changed since; nothing was touched.
        LockedError: the cache is being written.
        StorageError: the operating system refused.
    """
    if isinstance(cache, str) and is_url(cache):
        _repair_at(Store(cache), plan)
        return
    cache = Path(cache)
    with writing(cache):
        _seen_again(open_folder(cache), plan)
        for name in plan.set_aside:
            _set_aside(cache, name)
        if not plan.state:
            return
        manifest = _manifest_afterwards(Manifest.read(cache), plan)
        if plan.state == "complete":
            seal(cache, manifest)
        else:
            manifest.write(cache)


def _repair_at(store: Store, plan: RepairPlan) -> None:
    """:func:`repair` at a URL: files are copied to quarantine/, then removed."""
    with leased(store), tempfile.TemporaryDirectory(prefix="dflash-cache-") as scratch:
        there = set(_seen_again(StoreFolder(store), plan))
        for name in plan.set_aside:
            aside = f"{QUARANTINE_NAME}/{name.replace('/', '--')}"
            tries = (f"{aside}.{n}" if n else aside for n in count())
            aside = next(free for free in tries if free not in there)
            if name in there:
                store.move(name, aside)
        if not plan.state:
            return
        upload = Upload(store, Path(scratch))
        manifest = upload.manifest()
        if manifest is None:
            raise CacheError(store.url, f"has lost its {MANIFEST_NAME}; run the extract command again")
        manifest = _manifest_afterwards(manifest, plan)
        if plan.state == "complete":
            upload.seal(manifest)
        else:
            store.put(MANIFEST_NAME, manifest.to_bytes())


def _manifest_afterwards(manifest: Manifest, plan: RepairPlan) -> Manifest:
    """Without the tables; of state extracting before it is sealed."""
    files = {name: info for name, info in manifest.files.items() if name not in _TABLES}
    if plan.state == "complete":
        return replace(manifest, files=files)
    if plan.state == "extracting":
        return replace(manifest, state="extracting", files=files, quarantined=[], measured=None)
    identity = {name: value for name, value in manifest.identity.items() if name not in LATER_IDENTITY}
    nothing: dict[str, Any] = {
        "fingerprint": "",
        "data": None,
        "totals": None,
        "quarantined": [],
        "measured": None,
        "files": {},
    }
    return replace(manifest, state="preparing", identity=identity, **nothing)


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
