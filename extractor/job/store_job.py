"""An extraction whose cache goes to a URL: the same steps in a scratch folder, each file uploaded once it is made."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

from cache_format.errors import CacheError, InputError
from cache_format.layout.manifest import MANIFEST_NAME, Manifest
from cache_format.layout.samples import PreparedSamples
from cache_format.layout.shard import shard_name
from cache_format.storage.files import make_folder
from cache_format.storage.lease import leased
from cache_format.storage.lock import writing
from cache_format.storage.store import Store
from cache_format.writing.upload import Upload
from extractor.config import ExtractOptions
from extractor.job.job import PATIENCE_SECONDS, Job
from extractor.job.out_folder import require_space, shards_schema
from extractor.job.plan import Plan
from extractor.job.report import ExtractReport
from extractor.job.resume import missing_shards, way_out
from extractor.job.run import NUM_BUFFERS, RunStats, ShardRunner
from extractor.job.worker import Worker
from extractor.target.forward import HiddenStateExtractor
from extractor.terminal.progress import say

_POLL_SECONDS = 2.0


def extract_to_store(
    options: ExtractOptions,
    worker: Worker,
    on_todo: Callable[[int], None] | None,
    on_stats: Callable[[RunStats], None] | None,
) -> ExtractReport:
    """:func:`extractor.job.job.extract` to ``options.url``. Each worker has a scratch folder of its own below ``out``.

    Raises:
        DFlashCacheError: as there; what the store refuses too.
    """
    with opened(options, worker, on_todo, on_stats) as job:
        report = job.run(lambda: True)
        if report.complete:
            shutil.rmtree(job.out, ignore_errors=True)
        return report


@contextmanager
def opened(
    options: ExtractOptions,
    worker: Worker,
    on_todo: Callable[[int], None] | None = None,
    on_stats: Callable[[RunStats], None] | None = None,
) -> Iterator[StoreJob]:
    """The job of a cache at a URL; its scratch folder is locked and, by the worker that leads, the cache leased.

    Raises:
        DFlashCacheError: as :func:`extractor.job.job.extract`; nothing was written.
    """
    assert options.url is not None
    scratch = options.out / f"worker-{worker.rank}"
    upload = Upload(Store(options.url), scratch)
    upload.refuse_foreign()
    job = StoreJob(replace(options, out=scratch), upload, worker, on_todo, on_stats)
    stored = upload.manifest()
    if stored is not None:
        job.require_same_inputs(stored)
    make_folder(scratch)
    lease = leased(upload.store, say) if worker.leads else nullcontext(lambda: None)
    with job.grouped(), writing(scratch, first=job.clear), lease as allowed:
        upload.require(allowed)
        yield job


class StoreJob(Job):
    """A :class:`Job` in a scratch folder; ``where`` is the URL."""

    def __init__(
        self,
        options: ExtractOptions,
        upload: Upload,
        worker: Worker,
        on_todo: Callable[[int], None] | None = None,
        on_stats: Callable[[RunStats], None] | None = None,
    ):
        super().__init__(options, worker, on_todo, on_stats)
        self.upload, self.where = upload, upload.store.url

    def begun(self) -> Manifest:
        """See :meth:`Job.begun`."""
        if self.worker.leads:
            self.upload.pull()
        return super().begun()

    def await_plan(self) -> None:
        """See :meth:`Job.await_plan`; here the store is asked."""
        since = time.monotonic()
        while True:
            manifest = self.upload.manifest()
            if manifest is not None and manifest.state != "preparing":
                self.upload.pull()
                return
            if time.monotonic() - since > PATIENCE_SECONDS:
                raise InputError(
                    f"{self.where}: worker {self.worker.rank} has waited {PATIENCE_SECONDS / 60:.0f} minutes for "
                    "worker 0 to prepare the samples; look at its output, then start all again. Where preparing takes "
                    "long, run the command with one worker first, and stop it once shards are made"
                )
            time.sleep(_POLL_SECONDS)

    def require_allowed(self) -> None:
        """See :meth:`Job.require_allowed`: the lease may be lost."""
        self.upload.require_allowed()

    def current(self) -> Manifest:
        """See :meth:`Job.current`; what the manifest names is fetched, too."""
        self.upload.pull()
        return super().current()

    def has_shard(self, number: int) -> bool:
        """See :meth:`Job.has_shard`."""
        return number in self.upload.list_shards()

    def commit(self, manifest: Manifest) -> Manifest:
        """See :meth:`Job.commit`."""
        there = self.upload.commit(manifest)
        self.require_same_inputs(there)
        return there

    def prepared(self, manifest: Manifest) -> PreparedSamples:
        """See :meth:`Job.prepared`."""
        try:
            return super().prepared(manifest)
        except InputError:
            if not (self.out / MANIFEST_NAME).exists() and not self.upload.shards:
                self.upload.store.remove(MANIFEST_NAME)
            raise

    def require_room(self, manifest: Manifest, plan: Plan, share: list[int]) -> list[int]:
        """See :meth:`Job.require_room`: the scratch folder holds no more than the shards that are being written."""
        absent = [number for number in share if number not in self.upload.shards]
        largest = int(plan.shard_bytes(shards_schema(manifest))[absent].max()) if absent else 0
        require_space(self.out, largest * min(NUM_BUFFERS, len(absent)) + self.embedding_bytes(manifest))
        return absent

    def missing(self, manifest: Manifest, plan: Plan, share: list[int]) -> list[int]:
        """See :meth:`Job.missing`. Shards that a stopped run left in the scratch folder are uploaded."""
        schema, left = manifest.schema(), self.upload.left_behind()
        for number in sorted(set(left) - set(missing_shards(self.out, schema, plan, left))):
            self.upload.commit_shard(schema, number)
        return [number for number in share if number not in self.upload.shards]

    def runner(
        self, manifest: Manifest, plan: Plan, samples: PreparedSamples, extractor: HiddenStateExtractor
    ) -> ShardRunner:
        """See :meth:`Job.runner`."""
        schema = manifest.schema()
        made = super().runner(manifest, plan, samples, extractor)
        return replace(made, on_commit=lambda number: self.upload.commit_shard(schema, number))

    def sealed(self) -> Manifest:
        """See :meth:`Job.sealed`. Two workers that end at once both seal, with the same bytes."""
        manifest = self.upload.manifest()
        if manifest is None:
            raise CacheError(self.where, f"has lost its {MANIFEST_NAME} while the job ran; run the same command again")
        assert manifest.totals is not None
        there = len(set(self.upload.list_shards()) & set(range(manifest.totals.shards))) == manifest.totals.shards
        return self.upload.seal(manifest) if there and manifest.state != "complete" else manifest

    def require_all_files(self, manifest: Manifest) -> None:
        """See :meth:`Job.require_all_files`."""
        assert manifest.totals is not None
        names = self.upload.store.list()
        for name in (*manifest.files, *map(shard_name, range(manifest.totals.shards))):
            if name not in names:
                raise CacheError(self.upload.store.at(name), f"is missing; {way_out(self.where)}")
