"""What a cache says of its shards (manifest, samples/, index.arrow, shards.arrow), read and checked against itself."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from cache_format.errors import CacheError, StorageError
from cache_format.layout.embeddings import EMBEDDINGS_NAME
from cache_format.layout.index import INDEX_NAME, SHARDS_NAME, Index, ShardRow, read_index, read_shards
from cache_format.layout.manifest import MANIFEST_NAME, Manifest, Totals
from cache_format.layout.samples import PreparedSamples, part_path
from cache_format.layout.shard_layout import finished_shards, shard_name
from cache_format.storage.commit import TEMPORARY_SUFFIX
from cache_format.storage.file_info import file_info
from cache_format.storage.folder import Folder
from cache_format.upkeep.problem import Problem, told


class Tables:
    """All of a cache but the content of its shards. :meth:`read` first; what cannot be read is None afterwards."""

    index: Index | None = None
    rows: list[ShardRow] | None = None
    samples: PreparedSamples | None = None
    num_shards = 0
    """to look at: those of the manifest, unless it claims more than there can be"""

    def __init__(self, folder: Folder, manifest: Manifest):
        """``manifest``: of the cache in ``folder``."""
        self.folder, self.manifest = folder, manifest

    @property
    def totals(self) -> Totals:
        """Those of the manifest; a cache whose samples are still being prepared has none."""
        assert self.manifest.totals is not None
        return self.manifest.totals

    def state_problems(self) -> Iterator[Problem]:
        """Whether manifest.json is what this format writes, and says that the cache is complete."""
        if (self.folder.path / MANIFEST_NAME).read_bytes() != self.manifest.to_bytes():
            yield Problem(file=MANIFEST_NAME, problem="is not written the way this format writes it; it was changed")
        if self.manifest.state != "complete":
            run = self.manifest.run_again
            problem = f"is {self.manifest.state}, not complete; {run}"
            if self.manifest.totals is not None:
                there = len(finished_shards(self.folder.names("shards")))
                problem = f"unfinished: {there:,} of {self.manifest.totals.shards:,} shards; {run}"
            yield Problem(file=MANIFEST_NAME, field="state", problem=problem)

    def file_problems(self, *, content: bool) -> Iterator[Problem]:
        """Every file that the manifest names, or should name: its size and, with ``content``, its checksum."""
        yield from self._unnamed_files()
        for name, info in self.manifest.files.items():
            try:
                size = self.folder.size(name)
                if size is None:
                    yield Problem(file=name, problem="is missing")
                elif size != info.bytes:
                    yield Problem(file=name, problem=f"has {size:,} bytes, expected {info.bytes:,}")
                elif content and file_info(self.folder.local(name)) != info:
                    yield Problem(file=name, problem="does not match its checksum")
            except (CacheError, StorageError) as error:
                yield Problem(file=name, problem=told(error))
            except OSError as error:
                yield Problem(file=name, problem=told(StorageError(name, "look at", error)))

    def _unnamed_files(self) -> Iterator[Problem]:
        """Files that every cache has and this manifest has no checksum of."""
        named = self.manifest.files
        names = [EMBEDDINGS_NAME, *((INDEX_NAME, SHARDS_NAME) if self.manifest.state == "complete" else ())]
        parts = (f"samples/{part_path(self.folder.path, number).name}" for number in range(self.totals.parts))
        # The first part that is missing there: a manifest may claim any number of them.
        names += itertools.islice((name for name in parts if name not in named), 1)
        for name in names:
            if name not in named:
                yield Problem(file=name, problem=f"is not among the files that {MANIFEST_NAME} has checksums of")

    def read(self) -> Iterator[Problem]:
        """Read the samples and both tables, and compare them with the manifest."""
        try:
            for number in range(self.totals.parts):
                self.folder.local(f"samples/{part_path(self.folder.path, number).name}")
            self.samples = PreparedSamples(self.folder.path / "samples", self.totals.parts)
            is_named = self.samples.digest() == self.manifest.identity.get("samples")
            if len(self.samples) != self.totals.samples or not is_named:
                yield Problem(file="samples", problem="the prepared samples are not those of the manifest")
        except (CacheError, StorageError) as error:
            yield self.problem(error)
        if self.manifest.state == "complete":
            yield from self._read_tables()
        yield from self._count_problems()

    def _read_tables(self) -> Iterator[Problem]:
        try:
            self.rows = read_shards(self.folder.local(SHARDS_NAME), self.manifest.fingerprint)
            if len(self.rows) != self.totals.shards:
                problem = f"lists {len(self.rows)} shards, the manifest {self.totals.shards}"
                yield Problem(file=SHARDS_NAME, problem=problem)
        except (CacheError, StorageError) as error:
            yield self.problem(error)
        try:
            self.index = read_index(self.folder.local(INDEX_NAME), self.manifest.fingerprint)
            # What is there, not what the manifest claims: a claim of 2^60 samples would be allocated.
            known = len(self.index) + len(self.manifest.quarantined) if self.samples is None else len(self.samples)
            yield from self._coverage(self.index, min(self.totals.samples, known))
        except (CacheError, StorageError) as error:
            yield self.problem(error)

    def _count_problems(self) -> Iterator[Problem]:
        if self.samples is not None:
            most = len(self.samples)
        elif self.rows is not None:
            most = len(self.rows)
        else:
            most = len(self.folder.names("shards"))
        self.num_shards = min(self.totals.shards, most)
        if self.num_shards < self.totals.shards:
            problem = f"claims {self.totals.shards:,} shards, there can be {most:,}"
            yield Problem(file=MANIFEST_NAME, field="totals.shards", problem=problem)
        if self.index is not None and self._places[1]:
            yield Problem(file=INDEX_NAME, field="shard", problem="names shards that do not exist")

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

    def extra_files(self) -> Iterator[Problem]:
        """What lies in shards/ and is no shard of this cache."""
        planned = {shard_name(number).split("/")[1] for number in range(self.num_shards)}
        for name in sorted(set(self.folder.names("shards")) - planned):
            if not name.endswith(TEMPORARY_SUFFIX):
                yield Problem(file=f"shards/{name}", problem="is not a shard of this cache")

    def places(self, number: int) -> np.ndarray | None:
        """Positions in the index of a shard's samples, in the order of its rows; None where there is no index."""
        return None if self.index is None else self._places[0][number]

    @cached_property
    def _places(self) -> tuple[list[np.ndarray], bool]:
        """For each shard, and whether the index names others."""
        assert self.index is not None
        order = np.lexsort((self.index.row_start, self.index.shard))
        bounds = np.searchsorted(self.index.shard[order], np.arange(self.num_shards + 1))
        strange = bounds[0] != 0 or bounds[-1] != len(order)
        return [order[low:high] for low, high in itertools.pairwise(bounds)], bool(strange)

    def problem(self, error: CacheError | StorageError) -> Problem:
        """The error as a problem of the file that it names."""
        path, cache = Path(error.path), self.folder.path
        name = path.relative_to(cache).as_posix() if path.is_relative_to(cache) else error.path
        return Problem(file=name.removeprefix(f"{self.folder.where}/"), problem=told(error))
