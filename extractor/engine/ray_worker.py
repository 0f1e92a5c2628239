"""A worker of a Ray cluster: a process that holds the target on its device and makes the shards it is asked for.

Nothing heavy is imported before the environment is the driver's: huggingface_hub reads it when it is imported.
"""

from __future__ import annotations

import itertools
import os
import shutil
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from extractor.config import ExtractOptions
    from extractor.job.destination import Destination
    from extractor.job.job import Job
    from extractor.job.run_shards import RunStats
    from extractor.job.worker import Worker


class ShardWorker:
    """The actor's class. ``make`` may be called from two threads: one shard is computed while one is written."""

    def __init__(
        self,
        options: ExtractOptions,
        preparing: Worker,
        folder: str,
        environment: Mapping[str, str],
        own_scratch: bool,
    ):
        """
        Args:
            options: of the extraction.
            preparing: the one that leads, of those that prepare the samples; its job names the lock that they share.
            folder: relative paths count from it, as on the driver.
            environment: variables to set.
            own_scratch: whether ``options.out`` is a scratch folder that the user named, and not the driver's default.
        """
        with suppress(OSError):
            os.chdir(folder)
        os.environ.update(environment)
        self._options, self._preparing, self._own_scratch = options, preparing, own_scratch
        self._held = ExitStack()
        self._where: Destination | None = None
        self._computing, self._counting = threading.Lock(), threading.Lock()

    def hello(self) -> str:
        """Where this worker runs; answered as soon as it has a place."""
        return f"process {os.getpid()} on {socket.gethostname()}"

    def help(self, rank: int) -> None:
        """Prepare a share of the samples beside the worker that plans the cache.

        Raises:
            DFlashCacheError: this node's files are not those of the cache.
        """
        self._new_job(rank).prepare_share()

    def open(self) -> None:
        """Load the target. In a cache that is not planned yet, prepare and plan it: one worker at a time may do that.

        Raises:
            DFlashCacheError: this node's files are not those of the cache, or as ``extractor.job.job.extract``.
        """
        from extractor.job.run_shards import RunStats

        job = self._new_job()
        manifest = job.begun()
        samples = job.prepared(manifest)
        plan = job.plan(manifest, samples)
        if not job.destination.shared or manifest.state == "preparing":
            job.require_room(manifest, plan, list(range(len(plan))))
        manifest, plan, backend = job.loaded(manifest, samples, plan)
        # Ray kills the actor and all below it, and would leave the names of what they share.
        self._held.callback(backend.close)
        runner = job.runner(manifest, plan, samples, backend)
        self._making = self._held.enter_context(runner.begin(list(range(len(plan))), job.watched()))
        self._opened, self._done = time.monotonic(), RunStats()

    def _new_job(self, rank: int = 0) -> Job:
        from extractor.job.job import Job

        if self._where is None:
            self._where = self._held_destination()
        worker = replace(self._preparing, rank=rank)
        return Job(self._options, self._where, worker, self._where.manifest())

    def _held_destination(self) -> Destination:
        """Where the cache goes, held until :meth:`close`.

        A folder's lock is shared by all workers. At a URL, which the driver has leased, each worker of a node has a
        scratch folder.
        """
        from cache_format.errors import InputError
        from cache_format.writing.upload import scratch_folder
        from extractor.job.folder_destination import FolderDestination
        from extractor.job.url_destination import UrlDestination

        url, host = self._options.url, socket.gethostname()
        if url is None:
            in_folder = FolderDestination(self._options.out, self._preparing.job)
            if in_folder.manifest() is None:
                raise InputError(
                    f"{in_folder.where}: the node {host} does not see what the driver has put there; is it a folder "
                    "that all nodes share, under the same path?"
                )
            self._held.enter_context(in_folder.held())
            return in_folder
        below = self._options.out if self._own_scratch else scratch_folder(url)
        at_url = UrlDestination(url, _free_scratch(below, self._held), leads=False)
        if at_url.manifest() is None:
            raise InputError(
                f"{url}: the node {host} does not see what the driver has put there; do its "
                "environment (AWS_ENDPOINT_URL_S3, AWS_PROFILE, ...) and the driver's name the same store?"
            )
        at_url.clear()
        return at_url

    def make(self, number: int) -> RunStats:
        """Make and commit a shard; all that this worker has committed so far.

        Raises:
            DFlashCacheError: as :meth:`extractor.job.run_shards.ShardRunner.run`.
        """
        with self._computing:
            before = replace(self._making.stats)
            written = self._making.make(number)
            after = replace(self._making.stats)
        num_bytes, seconds = written.result()
        with self._counting:
            done = self._done
            for name in ("shards", "samples", "tokens", "padded_tokens", "seconds_waiting_for_disk"):
                setattr(done, name, getattr(done, name) + getattr(after, name) - getattr(before, name))
            done.bytes += num_bytes
            done.seconds_writing += seconds
            done.seconds = time.monotonic() - self._opened
            return replace(done)

    def close(self) -> None:
        """Give the lock back, and the scratch folder."""
        self._held.close()


def _free_scratch(below: Path, held: ExitStack) -> Path:
    """A scratch folder that no living worker has, until ``held`` is closed; then it goes, and those of dead workers."""
    from cache_format.storage.commit import make_folder
    from cache_format.storage.lock import LockedError, writing

    for number in itertools.count():
        scratch = below / f"actor-{number}"
        make_folder(scratch)
        with suppress(LockedError):
            held.enter_context(writing(scratch))
            held.callback(remove_free_scratch, below)
            held.callback(shutil.rmtree, scratch, ignore_errors=True)
            return scratch
    raise AssertionError("not reached")


def remove_free_scratch(below: Path) -> None:
    """Remove the scratch folders of workers that are dead."""
    from cache_format.errors import DFlashCacheError
    from cache_format.storage.lock import writing

    for scratch in below.glob("actor-*"):
        with suppress(DFlashCacheError), writing(scratch):
            shutil.rmtree(scratch, ignore_errors=True)
