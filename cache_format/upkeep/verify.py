"""verify: does a cache hold exactly what it says? Lists every problem it finds; a damaged file never stops it.

The tables are read whole. Shards are checked one by one: all or some of them (which_shards.py), by threads here or by
an engine, this worker's part of them, and perhaps without those that an earlier run found right (state.py).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from cache_format.errors import CacheError
from cache_format.layout.manifest import MANIFEST_NAME, Manifest
from cache_format.layout.shard_layout import shard_name
from cache_format.storage.folder import Folder, open_folder
from cache_format.upkeep.check_shard import CheckedShard, ShardCheck
from cache_format.upkeep.problem import Problem
from cache_format.upkeep.state import Seen, VerifyState
from cache_format.upkeep.tables import Tables
from cache_format.upkeep.which_shards import WhichShards, as_ranges, format_ranges

PROVES = {
    "quick": "no shard is missing, cut, extra or swapped, and every planned sample is there exactly once; "
    "not that every byte of the states is right",
    "full": "every byte is the one that was written, and every sample's tokens are the prepared ones; "
    "not that the states are those of the target (--recompute)",
}
"""By the depth of a report without problems on all shards."""

PROVES_OF_A_PART = {
    "quick": "its header, size and lists of samples are those that the tables name; not that every byte is right",
    "full": "every byte is the one that was written, and its tokens are the prepared ones",
}
"""The same of a shard that was checked, where others were not."""


@dataclass
class VerifyReport:
    """What was checked and what is wrong."""

    cache: str
    depth: str
    shards: int = 0
    """that were checked"""
    of_shards: int = 0
    """that the cache has, or will have"""
    checked: str = ""
    """their numbers as ranges, such as ``0-999,1500``"""
    samples: int = 0
    bytes: int = 0
    """of the shards that were checked"""
    resumed: int = 0
    """of these shards, how many an earlier run has found right"""
    since: str | None = None
    """when the earliest of those was"""
    bytes_read: int = 0
    """of the shards that this run has checked"""
    problems: list[Problem] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        """True where nothing is wrong with what was checked."""
        return not self.problems

    @property
    def proves(self) -> str | None:
        """What a report without problems proves, and of what; None where there are any."""
        if not self.whole:
            return None
        if self.shards == self.of_shards:
            proves = PROVES[self.depth]
        else:
            left = self.of_shards - self.shards
            proves = (
                f"of each of the {self.shards:,} shards {self.checked or '(none)'}: {PROVES_OF_A_PART[self.depth]}; "
                f"nothing of the other {left:,} of {self.of_shards:,} shards"
            )
        if self.resumed:
            proves += (
                f"; {self.resumed:,} of them were checked by earlier runs since {self.since}, and have the size and "
                "time that they had then"
            )
        return proves


Engine = Callable[[ShardCheck, list[int]], Generator[CheckedShard | None, None, None]]
"""Checks shards, and gives what it found in any order."""


def in_threads(threads: int | None = None) -> Engine:
    """An :data:`Engine`: so many threads of this process, or one a core."""

    def check_all(check: ShardCheck, numbers: list[int]) -> Generator[CheckedShard | None, None, None]:
        pool = ThreadPoolExecutor(threads or os.cpu_count() or 1, thread_name_prefix="verify")
        try:
            yield from pool.map(check, numbers)
        finally:
            pool.shutdown(cancel_futures=True)

    return check_all


def verify(
    cache: Path | str,
    *,
    quick: bool = False,
    which: WhichShards | None = None,
    rank: int = 0,
    world_size: int = 1,
    state: Path | None = None,
    threads: int | None = None,
    engine: Engine | None = None,
    listed: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> VerifyReport:
    """Check a cache in a folder or at a URL; of the latter shards are downloaded one a thread, or read by range.

    ``quick`` checks the manifest, the tables, every shard's header, size and head, and that each sample is there
    exactly once. Otherwise every byte is checked too: each sample's checksum, its tokens against the prepared
    samples, and the checksum of every other file. Memory stays bounded: data is read in chunks of 4 MiB a thread.

    Args:
        cache: folder or URL.
        quick: see above.
        which: the shards to check; None: all. Manifest, tables and the other files are checked in any case.
        rank, world_size: this worker checks every world_size-th of them. Only rank 0 checks the other files' checksums.
        state: folder that keeps what was found right, and from which it is taken over; None: nothing is kept.
        threads: that check; None: one a core.
        engine: who checks, in place of threads.
        listed: the fingerprint that a collection.json has of it.
        progress: called with the bytes of shards that this run has checked, and will check.

    Raises:
        CacheError: ``cache`` is not a feature cache at all, so there is nothing to verify.
        InputError: ``which`` names shards that the cache cannot have, or ``state`` holds something else.
        MismatchError: ``state`` is of another cache.
        StorageError: ``state`` cannot be written.
    """
    report = VerifyReport(str(cache), "quick" if quick else "full")
    folder = open_folder(cache)
    if not folder.has(MANIFEST_NAME):
        raise CacheError(folder.where, f"is not a feature cache: there is no {MANIFEST_NAME}")
    try:
        folder.local(MANIFEST_NAME)
        manifest = Manifest.read(folder.path)
    except CacheError as error:
        report.problems.append(Problem(file=MANIFEST_NAME, problem=error.problem))
        return report
    if listed not in (None, manifest.fingerprint):
        problem = "is of another cache than the one that collection.json lists"
        report.problems.append(Problem(file=MANIFEST_NAME, field="fingerprint", problem=problem))
    tables, which = Tables(folder, manifest), which or WhichShards()
    report.problems += tables.state_problems()
    if manifest.totals is None:
        return report
    report.of_shards = manifest.totals.shards
    which.require_within(manifest.totals.shards)
    report.problems += tables.read()
    # What shards were compared with has to be right, or nothing is kept of that.
    kept = VerifyState(state, cache, manifest, rank) if state is not None and report.whole else None
    report.problems += tables.file_problems(content=not quick and rank == 0)
    report.problems += tables.extra_files()
    chosen = which.of(tables.num_shards)
    share = _Share(report, folder, kept, chosen[rank::world_size])
    share.take_over()
    share.run(ShardCheck(tables, quick=quick), engine or in_threads(threads), progress)
    if kept is not None:
        kept.try_to_save(done=report.whole)
        if report.whole:
            kept.end(chosen, world_size)
    return report


class _Share:
    """This worker's shards: those already found right are taken over, the others are checked."""

    def __init__(self, report: VerifyReport, folder: Folder, kept: VerifyState | None, numbers: list[int]):
        self.report, self.folder, self.kept, self.todo = report, folder, kept, numbers
        self._stamps: dict[int, str] = {}
        self._checked: list[int] = []

    def take_over(self) -> None:
        if self.kept is None:
            return
        self._stamps = dict(self._stamped())
        found = self.kept.found_right(self._stamps)
        self.todo = [number for number in self.todo if number not in found]
        for number, seen in found.items():
            self._count(number, seen.samples, seen.bytes)
        self.report.resumed = len(found)
        if found:
            self.report.since = time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(self.kept.since))

    def _stamped(self) -> Iterator[tuple[int, str]]:
        """Before anything is read: a file that is replaced later has another stamp, and is checked again."""
        for number in self.todo:
            try:
                yield number, self.folder.stamp(shard_name(number))
            except CacheError:
                continue

    def run(self, check: ShardCheck, engine: Engine, progress: Callable[[int, int], None]) -> None:
        total = sum(map(self._size, self.todo))
        progress(0, total)
        try:
            with closing(engine(check, self.todo)) as results:
                for result in results:
                    if result is not None:
                        self._take(result)
                        progress(self.report.bytes_read, total)
        finally:
            self.report.checked = format_ranges(as_ranges(sorted(self._checked)))
            if self.kept is not None:
                self.kept.try_to_save(done=False)

    def _take(self, result: CheckedShard) -> None:
        self.report.problems += result.problems
        self.report.bytes_read += result.bytes
        self._count(result.number, result.samples, result.bytes)
        if self.kept is not None and not result.problems and result.number in self._stamps:
            self.kept.add(result.number, Seen(self._stamps[result.number], result.samples, result.bytes))

    def _count(self, number: int, samples: int, size: int) -> None:
        self._checked.append(number)
        self.report.shards += 1
        self.report.samples += samples
        self.report.bytes += size

    def _size(self, number: int) -> int:
        try:
            return self.folder.size(shard_name(number)) or 0
        except CacheError:
            return 0
