"""A Ray cluster: the driver hands out work and seals; an actor a device prepares samples and makes shards.

Actors come and go. One that has no place yet stops no other; one that dies gives its shards back and another is asked
for in its place, which an autoscaling cluster answers with a new node. All nodes see the data, the target and (unless
it is at a URL) the cache under the same paths.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import cycle
from typing import Any

import torch

from cache_format.device import RAY_GPUS
from cache_format.errors import CacheError, InputError, MismatchError
from cache_format.layout.manifest import Manifest
from cache_format.layout.samples import PreparedSamples
from cache_format.writing.upload import scratch_folder
from extractor.config import ExtractOptions
from extractor.engine.ray_cluster import (
    RayOptions,
    connected,
    environment,
    gpus_of_actor,
    import_ray,
    nodes,
    require_reachable,
    room,
)
from extractor.engine.ray_worker import ShardWorker, remove_free_scratch
from extractor.engine.shard_queue import ShardQueue, WorkerError
from extractor.job.destination import Destination
from extractor.job.job import Job, opened
from extractor.job.plan import Plan
from extractor.job.report import ExtractReport, progress_note
from extractor.job.run_shards import DeviceMemoryError, NonFiniteError, RunStats, added
from extractor.job.worker import Worker
from extractor.target.load_target import load_config, resolve_dtype
from extractor.target.quantised import method_of
from extractor.terminal.progress import Reporter, say

SHARDS_IN_HAND = 2
"""Of each actor: one on the device, one being written or waiting for the device."""

BARREN_DEATHS = 3
"""Deaths for each worker, none of the job having finished a shard between them, after which the job gives up."""

PATIENCE_SECONDS = 120.0
"""How long the driver waits at the end for the lock of actors that are gone; a network file system takes its time."""

SECONDS_TO_LEAVE = 5.0
"""How long it waits for them where the job ends early: less than a signal leaves it."""

_WAIT_SECONDS, _SAY_EVERY_SECONDS = 0.5, 60.0

FINAL_ERRORS = (InputError, MismatchError, CacheError, NonFiniteError, DeviceMemoryError)
"""Another worker would say the same; anything else is tried again elsewhere."""


def extract_with_ray(options: ExtractOptions, cluster: RayOptions) -> ExtractReport:
    """:func:`extractor.job.job.extract` by the actors of a Ray cluster.

    Raises:
        InputError: Ray is not installed, no such cluster, or as there.
        WorkerError: a shard, or the job, has cost too many workers. Finished shards are kept.
        DFlashCacheError: as there, of the first actor that failed.
    """
    ray = import_ray()
    require_reachable(cluster.address)
    if options.target.tp_plan:
        raise InputError("--tp-plan divides a target over the processes of torchrun; leave it out with --engine ray")
    if options.profile is not None:
        raise InputError("--profile follows one process; leave it out with --engine ray")
    gpus = gpus_of_actor(options.target, cluster.gpus_per_worker)
    # The driver may have no device like the workers': what depends on it is settled here.
    device = torch.device(RAY_GPUS if gpus else "cpu")
    config = load_config(options.target.name, options.target.revision, options.target.trust_remote_code)
    # A quantised target's own dtype is its checkpoint's.
    dtype = options.target.dtype if method_of(config) else resolve_dtype(options.target.dtype, device)
    target = replace(options.target, device=device.type, dtype=dtype)
    name = f"ray {os.getpid()} {secrets.token_hex(8)}"
    with _opened(replace(options, target=replace(target, device="cpu")), Worker(job=name)) as job:
        destination = job.destination
        manifest, stats = job.begun(), RunStats()
        if manifest.state == "complete":
            destination.require_all_files(manifest)
            say(f"{job.where}: already complete, nothing to do")
            return job.report(manifest, stats)
        ready = None if manifest.state == "preparing" else _planned(job, manifest, job.prepared(manifest))
        if ready is not None and destination.shared:
            job.require_room(manifest, *ready)
        if ready is None or ready[1]:
            own_scratch = options.url is None or options.out != scratch_folder(options.url)
            with connected(ray, cluster):
                count = cluster.num_workers or room(ray, gpus)
                preparing = Worker(job=name, world_size=count, local_size=-(-count // nodes(ray)))
                arguments = (replace(options, target=target), preparing, os.getcwd(), environment(), own_scratch)
                kind = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0, max_concurrency=SHARDS_IN_HAND)
                fleet = _Fleet(ray, lambda: kind(ShardWorker).remote(*arguments), count, gpus, destination)
                try:
                    stats = fleet.make(lambda: _begun(job), ready)
                except BaseException:
                    _await_end_of_workers(destination, SECONDS_TO_LEAVE)
                    raise
        return job.report(_sealed(destination), stats)


def _planned(job: Job, manifest: Manifest, samples: PreparedSamples) -> tuple[Plan, list[int]]:
    """The plan, and the shards that are missing."""
    plan = job.plan(manifest, samples)
    return plan, job.destination.missing(manifest.schema(), plan, list(range(len(plan))))


def _begun(job: Job) -> tuple[Plan, list[int]]:
    """As :func:`_planned`, of a cache that an actor has just planned."""
    job.destination.begin()
    manifest = Manifest.read(job.folder)
    samples = job.prepared(manifest)
    job.say_prepared(samples)
    return _planned(job, manifest, samples)


@contextmanager
def _opened(options: ExtractOptions, worker: Worker) -> Iterator[Job]:
    """The driver's job; scratch folders go with it."""
    with opened(options, worker) as job:
        yield job
        job.destination.close(complete=True)
        if not job.destination.shared:
            remove_free_scratch(options.out)


@dataclass(eq=False)
class _Seat:
    """An actor's place in the job: pending, placed, preparing, opening or working, from one actor to the next."""

    actor: Any
    state: str = "pending"
    has_helped: bool = False
    numbers: set[int] = field(default_factory=set)
    stats: RunStats = field(default_factory=RunStats)


class _Fleet:
    """The driver's side of all actors: what each is doing, what it gave, who takes its place."""

    def __init__(self, ray: Any, start: Callable[[], Any], count: int, gpus: int, destination: Destination):
        self._ray, self._start, self._count, self._gpus, self._destination = ray, start, count, gpus, destination
        self._seats: list[_Seat] = []
        self._calls: dict[Any, tuple[_Seat, str, int | None]] = {}
        self._queue: ShardQueue | None = None
        self._gone: list[RunStats] = []
        self._ranks = cycle(range(1, count)) if count > 1 else cycle([0])
        self._barren, self._said = 0, time.monotonic()

    def make(self, begin: Callable[[], tuple[Plan, list[int]]], ready: tuple[Plan, list[int]] | None) -> RunStats:
        """Make all missing shards.

        The plan and the shards that are missing are ``ready``, or ``begin`` gives them once the first actor has planned
        the cache, whose samples the others prepare with it.
        """
        self._how_to_begin, began = begin, time.monotonic()
        with Reporter("extract", None, "tokens") as self._reporter:
            if ready is not None:
                self._take_over(*ready)
            try:
                for _ in range(self._count if ready is None else min(self._count, len(ready[1]))):
                    self._seats.append(self._seat())
                while self._queue is None or self._queue:
                    self._destination.allowed()
                    self._hand_out()
                    done, _ = self._ray.wait(list(self._calls), num_returns=1, timeout=_WAIT_SECONDS)
                    for call in done:
                        if call in self._calls:
                            self._answered(call)
                    self._show(time.monotonic() - began)
                self._close()
            finally:
                for seat in self._seats:
                    self._ray.kill(seat.actor)
        return self._total(time.monotonic() - began)

    def _take_over(self, plan: Plan, numbers: list[int]) -> None:
        if len(numbers) < len(plan):
            say(f"{len(plan) - len(numbers):,} of {len(plan):,} shards are finished")
        self._queue = ShardQueue(numbers)
        self._reporter.total = sum(plan.shard(number).tokens for number in numbers)

    def _seat(self) -> _Seat:
        seat = _Seat(self._start())
        self._call(seat, "hello")
        return seat

    def _call(self, seat: _Seat, what: str, number: int | None = None) -> None:
        arguments = () if number is None else (number,)
        self._calls[getattr(seat.actor, what).remote(*arguments)] = (seat, what, number)

    def _hand_out(self) -> None:
        for seat in self._seats:
            first = self._queue is None and all(other.state != "opening" for other in self._seats)
            if seat.state == "placed" and (self._queue is not None or first):
                seat.state = "opening"
                self._call(seat, "open")
            elif seat.state == "placed" and not seat.has_helped:
                seat.state, seat.has_helped = "preparing", True
                self._call(seat, "help", next(self._ranks))
            while self._queue is not None and seat.state == "working" and len(seat.numbers) < SHARDS_IN_HAND:
                number = self._queue.take()
                if number is None:
                    break
                seat.numbers.add(number)
                self._call(seat, "make", number)

    def _answered(self, call: Any) -> None:
        seat, what, number = self._calls.pop(call)
        try:
            value = self._ray.get(call)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, FINAL_ERRORS):
                raise error.cause from None
            self._replace(seat, f"{type(error.cause).__name__}: {error.cause}")
        except self._ray.exceptions.RayError as error:
            self._replace(seat, str(error).strip().splitlines()[0])
        else:
            if what in ("hello", "help"):
                seat.state = "placed"
            elif what == "open":
                seat.state = "working"
                if self._queue is None:
                    self._take_over(*self._how_to_begin())
            elif self._queue is not None:
                assert number is not None
                self._barren = 0
                seat.numbers.remove(number)
                self._queue.made(number)
                if value.shards > seat.stats.shards:
                    seat.stats = value

    def _replace(self, seat: _Seat, reason: str) -> None:
        """Take a dead actor's shards back, and ask for another in its place."""
        self._barren += 1
        say(f"a worker is gone, another is asked for; what it had in hand goes to others ({reason})")
        self._calls = {call: about for call, about in self._calls.items() if about[0] is not seat}
        self._ray.kill(seat.actor)
        self._gone.append(seat.stats)
        self._seats.remove(seat)
        for number in sorted(seat.numbers, reverse=True):
            assert self._queue is not None
            if self._destination.has_shard(number):
                self._queue.made(number)
            else:
                self._queue.lost(number, reason)
        if self._barren >= BARREN_DEATHS * self._count:
            raise WorkerError(
                f"{self._barren} workers died one after the other and no shard was finished; the last: {reason}. "
                "Look at Ray's logs (ray logs), then run the same command again."
            )
        self._seats.append(self._seat())

    def _close(self) -> None:
        """Let living actors give back their locks and scratch folders; a dead one's lock goes with it."""
        calls = [seat.actor.close.remote() for seat in self._seats if seat.state != "pending"]
        for call in calls:
            with suppress(self._ray.exceptions.RayError):
                self._ray.get(call, timeout=PATIENCE_SECONDS)

    def _show(self, seconds: float) -> None:
        up = sum(seat.state == "working" for seat in self._seats)
        total = self._total(seconds)
        for number, seat in enumerate(self._seats):
            self._reporter.worker(f"worker {number}", seat.stats.tokens, None, seat.state)
        self._reporter.update(total.tokens, f"{up} of {len(self._seats)} workers, {progress_note(total)}")
        if not any(seat.state != "pending" for seat in self._seats):
            if time.monotonic() - self._said > _SAY_EVERY_SECONDS:
                self._said = time.monotonic()
                say(
                    f"waiting for a node with 1 CPU and {self._gpus} GPUs free (--gpus-per-worker; without GPUs: "
                    "--device cpu); `ray status` shows what the cluster has"
                )
        else:
            self._said = time.monotonic()

    def _total(self, seconds: float) -> RunStats:
        return replace(added([*self._gone, *(seat.stats for seat in self._seats)]), seconds=seconds)


def _sealed(destination: Destination) -> Manifest:
    """Seal once no actor can write any more.

    Raises:
        WorkerError: one still holds the lock.
    """
    if not _await_end_of_workers(destination, PATIENCE_SECONDS):
        raise WorkerError(
            f"{destination.where}: every shard is made, but another process still holds the lock (a worker on a "
            "node that was lost, or another job); run the same command again to seal the cache"
        )
    return destination.seal()


def _await_end_of_workers(destination: Destination, seconds: float) -> bool:
    """Whether no worker holds the lock any more, after so long at most: the same command again would find it held."""
    deadline = time.monotonic() + seconds
    while not destination.alone():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
