"""verify: does a cache hold exactly what it says? Lists every problem it finds; a damaged file never stops it."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cache_format.errors import CacheError, StorageError
from cache_format.layout.embeddings import EMBEDDINGS_NAME
from cache_format.layout.index import INDEX_NAME, SHARDS_NAME, Index, ShardRow, read_index, read_shards, shard_rows
from cache_format.layout.manifest import MANIFEST_NAME, Manifest
from cache_format.layout.samples import PreparedSamples, Sample, part_path
from cache_format.layout.shard_layout import ShardSchema, finished_shards, shard_name
from cache_format.layout.shard_reader import ShardFile
from cache_format.storage.commit import TEMPORARY_SUFFIX
from cache_format.storage.file_info import file_info
from cache_format.storage.folder import Folder, open_folder

PROVES = {
    "quick": "no shard is missing, cut, extra or swapped, and every planned sample is there exactly once; "
    "not that every byte of the states is right",
    "full": "every byte is the one that was written, and every sample's tokens are the prepared ones; "
    "not that the states are those of the target (--recompute)",
}
"""By the depth of a report without problems."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong."""

    file: str
    """path below the cache"""
    problem: str
    shard: int | None = None
    sample: int | None = None
    """sample_id"""
    field: str | None = None
    """tensor, column or manifest field"""

    def __str__(self) -> str:
        places = [("shard", self.shard), ("sample", self.sample), ("field", self.field)]
        where = ", ".join(f"{name} {value}" for name, value in places if value is not None)
        return f"{self.file}{f' ({where})' if where else ''}: {self.problem}"


@dataclass
class VerifyReport:
    """What was checked and what is wrong; ``whole`` is the answer."""

    cache: str
    depth: str
    shards: int = 0
    samples: int = 0
    bytes: int = 0
    """bytes of shards whose content was read and checked"""
    problems: list[Problem] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        """True where nothing is wrong."""
        return not self.problems


def verify(
    cache: Path | str,
    *,
    quick: bool = False,
    threads: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
    listed: str | None = None,
) -> VerifyReport:
    """Check a cache in a folder or at a URL; of the latter shards are downloaded one a thread, or read by range.

    ``quick`` checks the manifest, the tables, every shard's header, size and head, and that each sample is there
    exactly once. Otherwise every byte is checked too: each sample's checksum, its tokens against the prepared
    samples, and the checksum of every other file. Memory stays bounded: data is read in chunks of 4 MiB a thread.
    ``progress`` is called with the bytes of shards checked so far. ``listed``: the fingerprint that a collection.json
    has of it.

    Raises:
        CacheError: ``cache`` is not a feature cache at all, so there is nothing to verify.
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
    return _Verification(folder, manifest, quick, report).run(threads or os.cpu_count() or 1, progress)


class _Verification:
    def __init__(self, folder: Folder, manifest: Manifest, quick: bool, report: VerifyReport):
        self.folder, self.cache = folder, folder.path
        self.manifest, self.quick, self.report = manifest, quick, report
        self.index: Index | None = None
        self.rows: list[ShardRow] | None = None
        self.samples: PreparedSamples | None = None
        self.num_shards = 0

    def run(self, threads: int, progress: Callable[[int], None]) -> VerifyReport:
        add = self.report.problems.extend
        add(self._manifest_problems())
        if self.manifest.totals is None:
            return self.report
        add(self._unnamed_files())
        add(self._file_problems())
        add(self._table_problems())
        add(self._count_problems())
        add(self._extra_files())
        places = self._rows_by_shard()
        schema = self.manifest.schema()
        with ThreadPoolExecutor(threads, thread_name_prefix="verify") as pool:
            jobs = [pool.submit(self._shard_problems, schema, number, place) for number, place in enumerate(places)]
            for job in jobs:
                problems, samples, size = job.result()
                add(problems)
                self.report.shards += 1
                self.report.samples += samples
                self.report.bytes += size
                progress(self.report.bytes)
        return self.report

    def _manifest_problems(self) -> Iterator[Problem]:
        if (self.cache / MANIFEST_NAME).read_bytes() != self.manifest.to_bytes():
            yield Problem(file=MANIFEST_NAME, problem="is not written the way this format writes it; it was changed")
        if self.manifest.state != "complete":
            run = "run the cache's `dflash-cache extract` command again"
            problem = f"is {self.manifest.state}, not complete; {run}"
            if self.manifest.totals is not None:
                there = len(finished_shards(self.folder.names("shards")))
                problem = f"unfinished: {there:,} of {self.manifest.totals.shards:,} shards; {run}"
            yield Problem(file=MANIFEST_NAME, field="state", problem=problem)

    def _unnamed_files(self) -> Iterator[Problem]:
        """Files that every cache has and this manifest has no checksum of."""
        totals, named = self.manifest.totals, self.manifest.files
        assert totals is not None
        names = [EMBEDDINGS_NAME, *((INDEX_NAME, SHARDS_NAME) if self.manifest.state == "complete" else ())]
        parts = (f"samples/{part_path(self.cache, number).name}" for number in range(totals.parts))
        # The first part that is missing there: a manifest may claim any number of them.
        names += itertools.islice((name for name in parts if name not in named), 1)
        for name in names:
            if name not in named:
                yield Problem(file=name, problem=f"is not among the files that {MANIFEST_NAME} has checksums of")

    def _file_problems(self) -> Iterator[Problem]:
        for name, info in self.manifest.files.items():
            try:
                size = self.folder.size(name)
                if size is None:
                    yield Problem(file=name, problem="is missing")
                elif size != info.bytes:
                    yield Problem(file=name, problem=f"has {size:,} bytes, expected {info.bytes:,}")
                elif not self.quick and file_info(self.folder.local(name)) != info:
                    yield Problem(file=name, problem="does not match its checksum")
            except (CacheError, StorageError) as error:
                yield Problem(file=name, problem=_told(error))
            except OSError as error:
                yield Problem(file=name, problem=_told(StorageError(name, "look at", error)))

    def _table_problems(self) -> Iterator[Problem]:
        totals = self.manifest.totals
        assert totals is not None
        try:
            for number in range(totals.parts):
                self.folder.local(f"samples/{part_path(self.cache, number).name}")
            self.samples = PreparedSamples(self.cache / "samples", totals.parts)
            if len(self.samples) != totals.samples or self.samples.digest() != self.manifest.identity.get("samples"):
                yield Problem(file="samples", problem="the prepared samples are not those of the manifest")
        except (CacheError, StorageError) as error:
            yield self._problem(error)
        if self.manifest.state != "complete":
            return
        try:
            self.rows = read_shards(self.folder.local(SHARDS_NAME), self.manifest.fingerprint)
            if len(self.rows) != totals.shards:
                yield Problem(file=SHARDS_NAME, problem=f"lists {len(self.rows)} shards, the manifest {totals.shards}")
        except (CacheError, StorageError) as error:
            yield self._problem(error)
        try:
            self.index = read_index(self.folder.local(INDEX_NAME), self.manifest.fingerprint)
            # What is there, not what the manifest claims: a claim of 2^60 samples would be allocated.
            known = len(self.index) + len(self.manifest.quarantined) if self.samples is None else len(self.samples)
            yield from self._coverage(self.index, min(totals.samples, known))
        except (CacheError, StorageError) as error:
            yield self._problem(error)

    def _count_problems(self) -> Iterator[Problem]:
        """How many shards to look at: those of the manifest, unless it claims more than there can be."""
        totals = self.manifest.totals
        assert totals is not None
        most = totals.shards
        if self.samples is not None:
            most = len(self.samples)
        elif self.rows is not None:
            most = len(self.rows)
        else:
            most = len(self.folder.names("shards"))
        self.num_shards = min(totals.shards, most)
        if self.num_shards < totals.shards:
            problem = f"claims {totals.shards:,} shards, there can be {most:,}"
            yield Problem(file=MANIFEST_NAME, field="totals.shards", problem=problem)

    def _coverage(self, index: Index, num_samples: int) -> Iterator[Problem]:
        """Every prepared sample that is not quarantined, exactly once, in order."""
        stored = np.ones(num_samples, bool)
        stored[[sample for sample in self.manifest.quarantined if sample < num_samples]] = False
        expected = np.flatnonzero(stored)
        if np.array_equal(index.sample_id, expected):
            return
        ids, counts = np.unique(index.sample_id, return_counts=True)
        kinds = {
            "is not in the index": np.setdiff1d(expected, ids),
            "is in the index but was not planned": np.setdiff1d(ids, expected),
            "is in the index more than once": ids[counts > 1],
        }
        if not any(map(len, kinds.values())):
            yield Problem(file=INDEX_NAME, field="sample_id", problem="samples are out of order")
        for problem, samples in kinds.items():
            yield from (Problem(file=INDEX_NAME, sample=int(i), field="sample_id", problem=problem) for i in samples)

    def _extra_files(self) -> Iterator[Problem]:
        planned = {shard_name(number).split("/")[1] for number in range(self.num_shards)}
        for name in sorted(set(self.folder.names("shards")) - planned):
            if not name.endswith(TEMPORARY_SUFFIX):
                yield Problem(file=f"shards/{name}", problem="is not a shard of this cache")

    def _rows_by_shard(self) -> list[np.ndarray | None]:
        """For each shard the positions of its samples in the index, in the order of its rows."""
        if self.index is None:
            return [None] * self.num_shards
        order = np.lexsort((self.index.row_start, self.index.shard))
        bounds = np.searchsorted(self.index.shard[order], np.arange(self.num_shards + 1))
        if bounds[0] != 0 or bounds[-1] != len(order):
            self.report.problems.append(
                Problem(file=INDEX_NAME, field="shard", problem="names shards that do not exist")
            )
        return [order[low:high] for low, high in itertools.pairwise(bounds)]

    def _shard_problems(
        self, schema: ShardSchema, number: int, places: np.ndarray | None
    ) -> tuple[list[Problem], int, int]:
        """Problems of one shard, its samples, and its size in bytes."""
        name = shard_name(number)
        if self.manifest.state != "complete" and not self.folder.has(name):
            # Still to be made: one line about all of them says so.
            return [], 0, 0
        try:
            source = self.folder.open(name) if self.quick else self.folder.open_whole(name)
            with ShardFile(source, schema, number) as shard:
                problems = [*self._against_tables(shard, places)]
                if not self.quick:
                    problems += self._content_problems(shard)
                return problems, shard.num_samples, shard.container.num_bytes
        except (CacheError, StorageError) as error:
            return [Problem(file=name, shard=number, problem=_told(error))], 0, 0

    def _against_tables(self, shard: ShardFile, places: np.ndarray | None) -> Iterator[Problem]:
        """What shards.arrow and index.arrow say of the shard."""
        name, number = shard_name(shard.number), shard.number
        row, found = shard_rows(shard)
        if self.rows is not None and number < len(self.rows) and self.rows[number] != row:
            yield Problem(file=SHARDS_NAME, shard=number, problem=f"says {self.rows[number]} of {name}, which is {row}")
        if places is None or self.index is None:
            return
        for column in ("sample_id", "row_start", "num_tokens", "num_loss_tokens", "checksum"):
            if not np.array_equal(getattr(self.index, column)[places], getattr(found, column)):
                problem = f"does not say what {name} says of its samples"
                yield Problem(file=INDEX_NAME, shard=number, field=column, problem=problem)

    def _content_problems(self, shard: ShardFile) -> Iterator[Problem]:
        """Every byte of every sample against its checksum, and its tokens against the prepared sample."""
        name, number = shard_name(shard.number), shard.number
        for position, sample_id in enumerate(shard.sample_ids.tolist()):
            if shard.computed_checksum(position) != int(shard.sample_checksums[position]):
                yield Problem(file=name, shard=number, sample=sample_id, problem="does not match its checksum")
                continue
            stored = stored_sample(shard, position)
            masks = {
                "attention_mask": stored_rows(shard, "attention_mask", position) != 1,
                "loss_mask": stored.loss_mask > 1,
            }
            for field_name in (field_name for field_name, wrong in masks.items() if wrong.any()):
                problem = "has values that this format does not allow"
                yield Problem(file=name, shard=number, sample=sample_id, field=field_name, problem=problem)
            if self.samples is None or not 0 <= sample_id < len(self.samples):
                continue
            try:
                prepared = self.samples[sample_id]
            except (CacheError, StorageError) as error:
                yield self._problem(error)
                continue
            if stored.digest() != prepared.digest():
                yield Problem(
                    file=name,
                    shard=number,
                    sample=sample_id,
                    field="input_ids",
                    problem="its tokens or loss mask are not those of the prepared sample",
                )

    def _problem(self, error: CacheError | StorageError) -> Problem:
        path = Path(error.path)
        name = path.relative_to(self.cache).as_posix() if path.is_relative_to(self.cache) else error.path
        return Problem(file=name.removeprefix(f"{self.folder.where}/"), problem=_told(error))


def _told(error: CacheError | StorageError) -> str:
    """The error without its path. What the system will not give (a bad sector, no permission) is a problem as well."""
    return str(error).removeprefix(f"{error.path}: ")


def stored_sample(shard: ShardFile, position: int) -> Sample:
    """Tokens and loss mask of the sample at ``position`` of a shard.

    Raises:
        CacheError: the file ended early.
    """
    ids, mask = (stored_rows(shard, name, position) for name in ("input_ids", "loss_mask"))
    return Sample(ids.view("<i4"), mask, -1)


def stored_rows(shard: ShardFile, name: str, position: int) -> np.ndarray:
    """The bytes (uint8) of a per-token tensor for the sample at ``position``.

    Raises:
        CacheError: the file ended early.
    """
    offset, size = shard.row_range(name, int(shard.cu_seqlens[position]), int(shard.cu_seqlens[position + 1]))
    out = np.empty(size, np.uint8)
    shard.read_into(offset, out)
    return out
