"""A cache at a URL: files are made in a scratch folder of each worker and uploaded once they are whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import numpy as np

from cache_format.errors import CacheError
from cache_format.layout.manifest import MANIFEST_NAME, Manifest
from cache_format.layout.samples import part_path
from cache_format.layout.shard_layout import ShardSchema, shard_name
from cache_format.storage.lease import leased
from cache_format.storage.lock import writing
from cache_format.storage.own_folders import empty_but_for_lock
from cache_format.storage.store import Store
from cache_format.writing.upload import Upload
from extractor.job.destination import Destination
from extractor.job.folder_destination import FolderDestination, clear
from extractor.job.missing_shards import missing_shards, way_out
from extractor.job.plan import Plan
from extractor.job.run_shards import NUM_BUFFERS
from extractor.terminal.progress import say


class UrlDestination(Destination):
    """See :class:`Destination`. ``folder`` is the scratch folder."""

    shared = False
    poll_seconds = 2.0

    def __init__(self, url: str, scratch: Path, *, leads: bool):
        """``leads``: whether this worker holds the lease of the cache, for all workers of its job."""
        self.upload = Upload(Store(url), scratch)
        self.folder, self.where, self._leads = scratch, self.upload.store.url, leads

    def refuse_foreign(self) -> None:
        """See :class:`Destination`."""
        self.upload.refuse_foreign()

    def manifest(self) -> Manifest | None:
        """See :class:`Destination`."""
        return self.upload.manifest()

    @contextmanager
    def held(self) -> Iterator[None]:
        """See :class:`Destination`: the scratch folder is locked and, by the worker that leads, the cache leased."""
        lease = leased(self.upload.store, say) if self._leads else nullcontext(lambda: None)
        with writing(self.folder, first=self.clear, make=True), lease as allowed:
            self.upload.require(allowed)
            yield
        # That of all workers, if this one was the last.
        with suppress(OSError):
            self.folder.parent.rmdir()

    def clear(self) -> None:
        """Make the folders in the scratch folder, and remove what killed processes left there."""
        clear(self.folder)

    def alone(self) -> bool:
        """See :class:`Destination`. Not known here: two workers that end at once both seal, with the same bytes."""
        return True

    def allowed(self) -> None:
        """See :class:`Destination`: the lease may be lost."""
        self.upload.require_allowed()

    def begin(self) -> None:
        """See :class:`Destination`; what the manifest names is fetched."""
        self.upload.pull()

    def parts_seen(self) -> int:
        """See :class:`Destination`."""
        return len(self._parts_there())

    def _parts_there(self) -> list[str]:
        return [name for name in self.upload.store.list() if name.startswith("samples/")]

    def bring_part(self, number: int) -> None:
        """See :class:`Destination`."""
        self.upload.bring(part_path(Path("samples"), number).as_posix())

    def part_made(self, number: int) -> None:
        """See :class:`Destination`."""
        self.upload.push(part_path(Path("samples"), number).as_posix())

    def commit(self, manifest: Manifest) -> Manifest:
        """See :class:`Destination`."""
        return self.upload.commit(manifest)

    def forget(self) -> None:
        """See :class:`Destination`."""
        FolderDestination(self.folder, None).forget()
        if not (self.folder / MANIFEST_NAME).exists() and not self.upload.shards:
            for name in (MANIFEST_NAME, *self._parts_there()):
                self.upload.store.remove(name)

    def has_shard(self, number: int) -> bool:
        """See :class:`Destination`."""
        return number in self.upload.list_shards()

    def absent(self, numbers: Iterable[int]) -> list[int]:
        """See :class:`Destination`."""
        there = self.upload.shards
        return [number for number in numbers if number not in there]

    def missing(self, schema: ShardSchema, plan: Plan, numbers: Iterable[int]) -> list[int]:
        """See :class:`Destination`. Shards that a stopped run left in the scratch folder are uploaded."""
        left = self.upload.left_behind()
        for number in sorted(set(left) - set(missing_shards(self.folder, schema, plan, left))):
            self.upload.commit_shard(schema, number)
        return self.absent(numbers)

    def room(self, shard_bytes: np.ndarray) -> int:
        """See :class:`Destination`: no more than the shards that are being written."""
        return int(shard_bytes.max(initial=0)) * min(NUM_BUFFERS, len(shard_bytes))

    def on_commit(self, schema: ShardSchema) -> Callable[[int], None]:
        """See :class:`Destination`."""
        return lambda number: self.upload.commit_shard(schema, number)

    def seal(self) -> Manifest:
        """See :class:`Destination`."""
        manifest = self.upload.manifest()
        if manifest is None:
            raise CacheError(self.where, f"has lost its {MANIFEST_NAME} while the job ran; run the same command again")
        assert manifest.totals is not None
        there = len(set(self.upload.list_shards()) & set(range(manifest.totals.shards))) == manifest.totals.shards
        return self.upload.seal(manifest) if there and manifest.state != "complete" else manifest

    def require_all_files(self, manifest: Manifest) -> None:
        """See :class:`Destination`."""
        assert manifest.totals is not None
        names = self.upload.store.list()
        for name in (*manifest.files, *map(shard_name, range(manifest.totals.shards))):
            if name not in names:
                raise CacheError(self.upload.store.at(name), f"is missing; {way_out(self.where)}")

    def close(self, complete: bool) -> None:
        """See :class:`Destination`: the scratch folder is of no more use once the cache is complete."""
        if complete:
            empty_but_for_lock(self.folder)
