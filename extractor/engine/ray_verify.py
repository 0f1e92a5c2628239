"""verify on a Ray cluster: the driver reads the tables and hands out shards, a worker on each node checks them."""

from __future__ import annotations

import os
import socket
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

from cache_format.errors import DFlashCacheError, InputError
from cache_format.layout.manifest import MANIFEST_NAME, Manifest
from cache_format.storage.folder import open_folder
from cache_format.upkeep.check_shard import CheckedShard, ShardCheck
from cache_format.upkeep.tables import Tables
from cache_format.upkeep.verify import Engine
from extractor.engine.ray_cluster import RayOptions, connected, environment, import_ray, require_reachable, room
from extractor.engine.shard_queue import ShardQueue, WorkerError
from extractor.terminal.progress import say

MOST_THREADS = 64
"""Of a worker; as a rule it has one a core of its node."""

BARREN_DEATHS = 10
"""Workers that may die without a shard checked between them."""

_WAIT_SECONDS = 0.5


class VerifyWorker:
    """The actor's class: it has read the cache's tables and checks the shards that it is asked for."""

    def __init__(self, cache: Path | str, quick: bool, folder: str, variables: Mapping[str, str]):
        """``folder``, ``variables``: the driver's working folder and what it passes on of its environment."""
        os.environ.update(variables)
        self._cache = cache if isinstance(cache, str) else Path(folder) / cache
        self._quick = quick

    def open(self) -> int:
        """Read the tables; how many shards this worker checks at once.

        Raises:
            InputError: this node does not see the cache.
        """
        folder = open_folder(self._cache)
        if not folder.has(MANIFEST_NAME):
            raise InputError(f"{folder.where}: the node {socket.gethostname()} does not see it; do all nodes share it?")
        folder.local(MANIFEST_NAME)
        tables = Tables(folder, Manifest.read(folder.path))
        # What is wrong with them the driver has found.
        list(tables.read())
        self._check = ShardCheck(tables, quick=self._quick)
        return min(os.cpu_count() or 1, MOST_THREADS)

    def check(self, number: int) -> CheckedShard | None:
        """See :class:`ShardCheck`."""
        return self._check(number)


def by_ray(cache: Path | str, quick: bool, cluster: RayOptions) -> Engine:
    """An engine for :func:`cache_format.upkeep.verify.verify`.

    Raises:
        InputError: Ray is not installed, or there is no such cluster.
        WorkerError: a shard has cost too many workers.
    """
    ray = import_ray()
    require_reachable(cluster.address)

    def check_all(_check: ShardCheck, numbers: list[int]) -> Generator[CheckedShard | None, None, None]:
        if not numbers:
            return
        with connected(ray, cluster):
            kind: Any = ray.remote(num_cpus=1, max_restarts=0, max_concurrency=MOST_THREADS)(VerifyWorker)
            spread = kind.options(scheduling_strategy="SPREAD")
            fleet = _Fleet(ray, lambda: spread.remote(cache, quick, os.getcwd(), environment()), ShardQueue(numbers))
            yield from fleet.results(min(cluster.num_workers or room(ray, 0), len(numbers)))

    return check_all


class _Fleet:
    """The driver's side: who has which shards in hand. A worker that dies gives them back, another takes its place."""

    def __init__(self, ray: Any, start: Any, queue: ShardQueue):
        self._ray, self._start, self._queue = ray, start, queue
        self._free: dict[Any, int] = {}
        self._calls: dict[Any, tuple[Any, int | None]] = {}
        self._barren = 0

    def results(self, count: int) -> Generator[CheckedShard | None, None, None]:
        """Check all of the queue with so many workers.

        Raises:
            WorkerError: workers die one after the other, or one shard costs too many.
        """
        for _ in range(count):
            self._add()
        while self._queue:
            done, _ = self._ray.wait(list(self._calls), num_returns=1, timeout=_WAIT_SECONDS)
            for call in done:
                if call not in self._calls:
                    continue
                actor, number = self._calls.pop(call)
                try:
                    value = self._ray.get(call)
                except self._ray.exceptions.RayTaskError as error:
                    if isinstance(error.cause, DFlashCacheError):
                        raise error.cause from None
                    self._replace(actor, number, f"{type(error.cause).__name__}: {error.cause}")
                    continue
                except self._ray.exceptions.RayError as error:
                    self._replace(actor, number, str(error).strip().splitlines()[0])
                    continue
                if number is None:
                    self._free[actor] = value
                else:
                    self._free[actor] += 1
                    self._barren = 0
                    self._queue.made(number)
                    yield value
                self._hand_out(actor)

    def _add(self) -> None:
        actor = self._start()
        self._free[actor] = 0
        self._calls[actor.open.remote()] = (actor, None)

    def _hand_out(self, actor: Any) -> None:
        while self._free[actor] and (number := self._queue.take()) is not None:
            self._free[actor] -= 1
            self._calls[actor.check.remote(number)] = (actor, number)

    def _replace(self, actor: Any, number: int | None, reason: str) -> None:
        say(f"a worker is gone, another is asked for; what it had in hand goes to others ({reason})")
        lost = [number] + [other for whose, other in self._calls.values() if whose is actor]
        self._calls = {call: about for call, about in self._calls.items() if about[0] is not actor}
        del self._free[actor]
        self._ray.kill(actor)
        for shard in lost:
            if shard is not None:
                self._queue.lost(shard, reason)
        self._barren += 1
        if self._barren >= BARREN_DEATHS:
            raise WorkerError(f"{self._barren} workers died one after the other; the last: {reason}")
        self._add()
