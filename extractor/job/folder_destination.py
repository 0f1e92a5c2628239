"""A cache in a folder: files are made where they stay, workers share its lock."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from cache_format.layout.manifest import MANIFEST_NAME, Manifest
from cache_format.layout.shard_layout import ShardSchema, shard_name
from cache_format.storage.commit import make_folder
from cache_format.storage.lock import writing
from cache_format.storage.own_folders import begin_folders
from cache_format.writing.seal import seal
from extractor.job.destination import Destination
from extractor.job.missing_shards import missing_shards, require_all_files
from extractor.job.out_folder import refuse_foreign_folder
from extractor.job.plan import Plan


class FolderDestination(Destination):
    """See :class:`Destination`."""

    shared = True
    poll_seconds = 0.2

    def __init__(self, folder: Path, job: str | None):
        """``job``: names the lock that the workers of a job share; None: there is one worker."""
        self.folder, self.where, self._job = folder, str(folder), job
        self._alone: Callable[[], bool] = lambda: True

    def refuse_foreign(self) -> None:
        """See :class:`Destination`."""
        refuse_foreign_folder(self.folder)

    def manifest(self) -> Manifest | None:
        """See :class:`Destination`."""
        return Manifest.find(self.folder)

    @contextmanager
    def held(self) -> Iterator[None]:
        """See :class:`Destination`."""
        make_folder(self.folder)
        with writing(self.folder, self._job, first=self._clear) as alone:
            self._alone = alone
            yield

    def _clear(self) -> None:
        # Once more: another command may have come first.
        self.refuse_foreign()
        clear(self.folder)

    def alone(self) -> bool:
        """See :class:`Destination`."""
        return self._alone()

    def allowed(self) -> None:
        """See :class:`Destination`; a lock cannot be taken away."""

    def begin(self) -> None:
        """See :class:`Destination`; it is the same folder."""

    def parts_seen(self) -> int:
        """See :class:`Destination`."""
        return len(list((self.folder / "samples").glob("*.arrow")))

    def bring_part(self, number: int) -> None:
        """See :class:`Destination`; it is there."""

    def part_made(self, number: int) -> None:
        """See :class:`Destination`; they see it."""

    def commit(self, manifest: Manifest) -> Manifest:
        """See :class:`Destination`."""
        manifest.write(self.folder)
        return manifest

    def forget(self) -> None:
        """See :class:`Destination`."""
        if not any((self.folder / "shards").iterdir()):
            # The manifest first: it tells the other workers to stop, which may yet write a part.
            (self.folder / MANIFEST_NAME).unlink(missing_ok=True)
            shutil.rmtree(self.folder / "samples", ignore_errors=True)

    def has_shard(self, number: int) -> bool:
        """See :class:`Destination`."""
        return (self.folder / shard_name(number)).exists()

    def absent(self, numbers: Iterable[int]) -> list[int]:
        """See :class:`Destination`."""
        return [number for number in numbers if not self.has_shard(number)]

    def missing(self, schema: ShardSchema, plan: Plan, numbers: Iterable[int]) -> list[int]:
        """See :class:`Destination`."""
        return missing_shards(self.folder, schema, plan, numbers)

    def room(self, shard_bytes: np.ndarray) -> int:
        """See :class:`Destination`."""
        return int(shard_bytes.sum())

    def on_commit(self, schema: ShardSchema) -> None:
        """See :class:`Destination`."""

    def seal(self) -> Manifest:
        """See :class:`Destination`."""
        manifest = Manifest.read(self.folder)
        assert manifest.totals is not None
        there = all(map(self.has_shard, range(manifest.totals.shards)))
        return seal(self.folder, manifest) if there and manifest.state != "complete" else manifest

    def require_all_files(self, manifest: Manifest) -> None:
        """See :class:`Destination`."""
        require_all_files(self.folder, manifest)

    def close(self, complete: bool) -> None:
        """See :class:`Destination`."""


def clear(folder: Path) -> None:
    """Make the folders of a cache and remove what killed processes left half-written, before any other worker comes."""
    begin_folders(folder, ("samples", "shards", "target"))
