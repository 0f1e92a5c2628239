"""Carry out an export: file by file, each committed whole; the same command again goes on where it stopped."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache_format.errors import CacheError, InputError, MismatchError, StorageError
from cache_format.export.interface import Layout, LeftOut
from cache_format.reading.feature_cache import SEEN, FeatureCache
from cache_format.storage.commit import committed, make_folder, remove_temporaries, write_all
from cache_format.storage.lock import writing
from cache_format.storage.own_folders import refuse_foreign
from cache_format.storage.paths import inside

MARKER_NAME = "export.json"
FORMAT_NAME = "dflash-cache-export"
BLOCK_BYTES = 4096
"""A file takes up to this much more on the disk than its bytes."""


@dataclass(frozen=True, kw_only=True)
class ExportPlan:
    """What an export will write."""

    layout: str
    reader: str
    samples: int
    files: int
    bytes: int
    done_files: int
    """of these, written by an earlier run"""
    done_bytes: int
    free_bytes: int
    """on the disk of OUT"""
    settings: list[str]
    """what to set in the peer's trainer"""

    @property
    def missing_bytes(self) -> int:
        """What is still to be written, as it counts on a disk."""
        return self.bytes - self.done_bytes + BLOCK_BYTES * (self.files - self.done_files)


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What a run of :func:`export` did."""

    files: int
    """written by this run"""
    bytes: int
    done_files: int
    """found done"""
    left_out: int
    """samples that the peer's reader would refuse; see the layout"""


def plan_export(cache: FeatureCache, layout: Layout, out: Path) -> ExportPlan:
    """What ``export`` to folder ``out`` will take; reads no states and writes nothing.

    Raises:
        InputError: the cache lacks what the layout needs, ``out`` holds something else, or the disk is too small.
        MismatchError: ``out`` was begun from another cache or in another layout.
    """
    layout.check(cache)
    _check_out(cache, layout, out)
    files = total = done_files = done_bytes = 0
    for file in layout.files(cache):
        done = os.path.lexists(inside(out, file.name))
        files, total = files + 1, total + file.num_bytes
        done_files, done_bytes = done_files + done, done_bytes + done * file.num_bytes
    plan = ExportPlan(
        layout=layout.name,
        reader=layout.reader,
        samples=len(cache),
        files=files,
        bytes=total,
        done_files=done_files,
        done_bytes=done_bytes,
        free_bytes=shutil.disk_usage(_existing(out)).free,
        settings=layout.settings(cache),
    )
    if plan.missing_bytes > plan.free_bytes:
        raise InputError(
            f"{out}: the export needs {plan.missing_bytes / 1e9:,.1f} GB more but the disk has "
            f"{plan.free_bytes / 1e9:,.1f} GB free. Free some space, or choose an OUT on another disk"
        )
    return plan


def export(
    cache: FeatureCache, layout: Layout, out: Path, *, progress: Callable[[int, int], None] = lambda files, size: None
) -> ExportReport:
    """Write every file that ``out`` does not have yet; at most one sample or shard is in memory.

    Killed at any instant and run again, it ends in the same files. ``progress`` is called after each file with the
    files and bytes that are done, those of earlier runs included.

    Raises:
        InputError, MismatchError: as for :func:`plan_export`.
        CacheError: the cache is damaged, or a sub-folder leads out of ``out`` through a symbolic link.
        LockedError: another export is writing there.
        StorageError: the operating system refused; what was finished is kept.
    """
    layout.check(cache)
    _check_out(cache, layout, out)
    make_folder(out)
    with writing(out):
        # Once more: another export may have come first.
        return _write(cache, layout, out, _check_out(cache, layout, out), progress)


def _write(
    cache: FeatureCache, layout: Layout, out: Path, marker: dict[str, Any], progress: Callable[[int, int], None]
) -> ExportReport:
    with committed(out / MARKER_NAME) as file:
        write_all(file, _json(marker))
    written = size = done_files = done_bytes = left_out = 0
    folders: set[Path] = set()
    for entry in layout.files(cache):
        # A sub-folder that is a link would lead the writing out of OUT.
        path = inside(out, entry.name)
        if path.parent not in folders:
            folders.add(path.parent)
            make_folder(path.parent)
            remove_temporaries(path.parent)
        if os.path.lexists(path):
            done_files, done_bytes = done_files + 1, done_bytes + entry.num_bytes
        else:
            try:
                with committed(path) as file:
                    entry.fill(file)
            except LeftOut:
                left_out += 1
            else:
                written, size = written + 1, size + entry.num_bytes
        progress(done_files + written, done_bytes + size)
    with committed(out / MARKER_NAME) as file:
        write_all(file, _json({**marker, "state": "complete"}))
    return ExportReport(files=written, bytes=size, done_files=done_files, left_out=left_out)


def _check_out(cache: FeatureCache, layout: Layout, out: Path) -> dict[str, Any]:
    """The marker of this export; refuses an ``out`` that is not this export's own."""
    if out.resolve().is_relative_to(cache.path.resolve()) or cache.path.resolve().is_relative_to(out.resolve()):
        raise InputError(f"{out}: choose an OUT beside the cache, not inside it or around it")
    same = {"layout": layout.name, "reader": layout.reader, "fingerprint": cache.manifest.fingerprint, **cache.seen}
    marker = {"format": FORMAT_NAME, **same, "state": "exporting"}
    refuse_foreign(out, "an export", MARKER_NAME, ())
    if not os.path.lexists(out / MARKER_NAME):
        return marker
    found = _read_marker(out / MARKER_NAME)
    names = dict.fromkeys([*same, *(name for name in SEEN if name in found)])
    different = {name: (found.get(name), same.get(name)) for name in names if found.get(name) != same.get(name)}
    if different:
        raise MismatchError(
            f"{out}: was begun as another export; nothing was touched. Different:", different, "Choose another OUT."
        )
    return marker


def _read_marker(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes()[: 1 << 20])
    except OSError as error:
        raise StorageError(path, "read", error) from error
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.get("format") != FORMAT_NAME:
        raise CacheError(path, "is not the marker of an export; choose another OUT")
    return found


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n"


def _existing(path: Path) -> Path:
    """``path`` or its nearest parent that exists."""
    path = path.absolute()
    return path if path.exists() else _existing(path.parent)
