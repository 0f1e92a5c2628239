"""A worker of a Ray cluster: a process that holds the target on its device and makes the shards it is asked for.

Nothing heavy is imported before the environment is the driver's: huggingface_hub reads it when it is imported.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from extractor.config import ExtractOptions
    from extractor.run import RunStats


class ShardWorker:
    """The actor's class. ``make`` may be called from two threads: one shard is computed while one is written."""

    def __init__(self, options: ExtractOptions, job: str, folder: str, environment: Mapping[str, str]):
        """``job`` names the lock that the workers share; relative paths count from ``folder``, as on the driver."""
        with suppress(OSError):
            os.chdir(folder)
        os.environ.update(environment)
        self._options, self._job = options, job
        self._held = ExitStack()
        self._computing, self._counting = threading.Lock(), threading.Lock()

    def hello(self) -> str:
        """Where this worker runs; answered as soon as it has a place."""
        return f"process {os.getpid()} on {socket.gethostname()}"

    def open(self) -> None:
        """Load the target. In a cache that is not planned yet, plan it: one worker at a time may do that.

        Raises:
            DFlashCacheError: this node's files are not those of the cache, or as ``extractor.job.extract``.
        """
        from cache_format.lock import writing
        from extractor.engine.worker import Worker
        from extractor.job import Job
        from extractor.run import RunStats

        job = Job(self._options, Worker(job=self._job))
        self._held.enter_context(writing(job.out, self._job))
        manifest = job.begun()
        samples = job.prepared(manifest)
        manifest, plan, extractor = job.loaded(manifest, samples, job.plan(manifest, samples))
        runner = job.runner(manifest, plan, samples, extractor)
        self._making = self._held.enter_context(runner.begin(list(range(len(plan)))))
        self._opened, self._done = time.monotonic(), RunStats()

    def make(self, number: int) -> RunStats:
        """Make and commit a shard; all that this worker has committed so far.

        Raises:
            DFlashCacheError: as :meth:`extractor.run.ShardRunner.run`.
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
        """Give the lock back."""
        self._held.close()
