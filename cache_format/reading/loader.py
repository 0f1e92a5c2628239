"""Batches for training: the epoch's order, reader threads, memory used again, exact resume.

Why there is no data-loading framework under it: Grain 0.2.18 and torchdata.nodes 0.11 were put under the same order
and the same read (``FeatureCache.gather`` into pooled buffers), 4 threads, 4 batches ahead. Bandwidth is about the same
(Grain 6.9, this 7.0, torchdata 5.4 GB/s on 2 cores); a batch costs 34, 16 and 59 microseconds beside its read. Their
state counts the items of one iterator, and ours has to count global batches, so that another number of ranks can go on
from it: the order would be ours all the same, and what is left for a framework is the executor of the standard library
and a queue. So that is what is used, and importing cache_format stays light.
"""

from __future__ import annotations

import operator
import os
import sys
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch
import xxhash

from cache_format.batch import DFlashTargetBatch
from cache_format.device import count, current_stream, has_streams, new_stream, on_stream, used_on
from cache_format.errors import InputError, MismatchError
from cache_format.reading.batch_source import BatchSource
from cache_format.reading.buffer_pool import BufferPool
from cache_format.reading.gather import Gathered
from cache_format.reading.order import (
    SHUFFLES,
    Batches,
    batch_rows,
    batches_by_count,
    batches_by_tokens,
    batches_of_packed_rows,
    full_order,
    left_out,
    num_steps,
    random_source,
    require_rows,
    weighted,
    window_order,
)
from cache_format.reading.read_ahead import Turn
from cache_format.reading.selection import Filter, Split, select


@dataclass(frozen=True, kw_only=True)
class LoaderOptions:
    """Options of ``FeatureCache.loader``, where they are described."""

    batch_size: int | None
    batch_tokens: int | None
    pack_to: int | None
    shuffle: bool | str
    window_shards: int
    seed: int
    drop_last: bool
    max_length: int | None
    trim: bool
    filter: Filter | None
    split: Split | None
    rank: int
    world_size: int
    device: torch.device | None
    threads: int
    prefetch: int
    decode_on_host: bool

    def __post_init__(self) -> None:
        if (self.batch_size is None) == (self.batch_tokens is None):
            raise InputError("loader: give either batch_size= (samples) or batch_tokens= (tokens, padding included)")
        if self.pack_to is not None and self.batch_size is None:
            raise InputError("loader: pack_to= makes rows of one length; give batch_size= (rows), not batch_tokens=")
        for name in ("batch_size", "batch_tokens", "pack_to", "window_shards", "max_length", "threads", "prefetch"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise InputError(f"loader: {name} is {value!r}; it must be a whole number of at least 1")
        if not isinstance(self.shuffle, bool) and self.shuffle not in SHUFFLES:
            raise InputError(f'loader: shuffle is {self.shuffle!r}; choose True ("full"), "window" or False')
        _require_from_zero("seed", self.seed)
        if self.device is not None and has_streams(self.device) and not count(self.device.type):
            raise InputError(
                f"loader: device is {self.device}, and torch finds no {self.device.type.upper()} device here"
            )
        if not 0 <= self.rank < self.world_size:
            raise InputError(f"loader: rank {self.rank} is not one of {self.world_size} (world_size)")

    def order_fields(self) -> dict[str, Any]:
        """What the batches of an epoch depend on, beside the samples and the epoch."""
        names = ("batch_size", "batch_tokens", "pack_to", "window_shards", "seed", "max_length")
        return {"shuffle": self.shuffle_kind} | {name: getattr(self, name) for name in names}

    @property
    def shuffle_kind(self) -> str | None:
        """``full``, ``window`` or None."""
        return "full" if self.shuffle is True else self.shuffle or None


@dataclass(eq=False, slots=True, frozen=True)
class _Iteration:
    """One run over an epoch, from its first batch to where it is left."""

    pid: int
    """the process that has its reader threads"""


class CacheLoader:
    """An iterable of :class:`DFlashTargetBatch`; every iteration is one epoch. Made by ``FeatureCache.loader``."""

    def __init__(self, cache: BatchSource, options: LoaderOptions):
        self._cache, self._options = cache, options
        selection = select(cache, options.max_length, options.trim, options.filter, options.split)
        self._samples, self._lengths = selection.samples, selection.lengths
        _require_room(options, self._lengths[self._samples])
        self._epoch, self._done, self._resumed = 0, 0, False
        self._live: _Iteration | None = None
        self._planned: tuple[int, Batches] | None = None
        require_rows(self._batches(), options.world_size, options.drop_last)

    def __len__(self) -> int:
        """Steps of a whole epoch on this rank, the same on every rank."""
        return num_steps(self._batches(), 0, self._options.world_size, self._options.drop_last)

    @property
    def epoch(self) -> int:
        """The epoch that is, or will next be, iterated over."""
        return self._epoch

    @property
    def steps_left(self) -> int:
        """Steps that the next iteration has on this rank: of a whole epoch, or what a loaded state leaves of one."""
        begun = self._done if self._resumed else 0
        return num_steps(self._batches(), begun, self._options.world_size, self._options.drop_last)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration. Where none is chosen, each iteration is followed by the next epoch.

        Naming the epoch that a loaded state stands in keeps its place.

        Raises:
            InputError: not a whole number of at least 0, or another epoch is being iterated over.
        """
        _require_from_zero("epoch", epoch)
        if epoch != self._epoch:
            self._require_rest(f"set_epoch({epoch})")
            self._epoch, self._done, self._resumed = epoch, 0, False

    def state_dict(self) -> dict[str, Any]:
        """Where the training stands: all batches given out so far count as done. Plain numbers and strings.

        Every rank has the same state after the same number of steps; any one of them serves all. It is that of the
        iteration that was begun last: an earlier one that is asked for another batch says so.
        """
        return {"epoch": self._epoch, "batches_done": self._done, "order": self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken, on any number of ranks and with any number of threads.

        Raises:
            MismatchError: the state is of another cache or another order (names the fields); nothing is changed.
            InputError: it is not the state of a loader, or an epoch is being iterated over.
        """
        have, asked = self._identity, _field(state, "order")
        if not isinstance(asked, Mapping):
            raise InputError(f"loader: the state's order is {asked!r}; pass what state_dict() of a loader gave")
        different = {
            name: (have.get(name), asked.get(name))
            for name in sorted({*have, *asked})
            if have.get(name) != asked.get(name)
        }
        if different:
            raise MismatchError(
                "loader: the state was taken from another order of samples. Different:",
                different,
                'Make the loader with the options of that run ("asked for"), or start the epoch anew.',
            )
        epoch, done = (_whole_number(state, name) for name in ("epoch", "batches_done"))
        self._require_rest("load_state_dict()")
        there = len(self._plan(epoch))
        if done > there:
            raise InputError(f"loader: the state's batches_done is {done:,}, but epoch {epoch} has {there:,} batches")
        self._epoch, self._done, self._resumed = epoch, done, True

    def skip(self, steps: int) -> CacheLoader:
        """Leave out the next ``steps`` steps of each rank; the iteration then begins after them. Gives the loader.

        Raises:
            InputError: more than are left of the epoch, or an epoch is being iterated over.
        """
        _require_from_zero("skip", steps)
        self._require_rest(f"skip({steps})")
        options, batches, begun = self._options, self._batches(), self._done if self._resumed else 0
        left = self.steps_left
        if steps > left:
            raise InputError(f"loader: skip({steps:,}), but {left:,} steps are left of epoch {self._epoch}")
        if steps:
            turn = batch_rows(batches, begun, steps - 1, options.rank, options.world_size, options.drop_last)
            self._done, self._resumed = turn[1], True
        return self

    def __repr__(self) -> str:
        options, size = self._options, self._options.batch_size
        kind = f"batch_tokens={options.batch_tokens:,}" if size is None else f"batch_size={size:,}"
        packed = "" if options.pack_to is None else f", pack_to={options.pack_to:,}"
        return (
            f"CacheLoader({kind}{packed}, shuffle={options.shuffle_kind or False!r}, seed={options.seed}, rank "
            f"{options.rank} of {options.world_size}: {len(self._samples):,} samples, {len(self):,} steps an epoch; "
            f"epoch {self._epoch}, {self._done:,} of {len(self._batches()):,} batches done)"
        )

    def _require_rest(self, what: str) -> None:
        if self._live is not None and self._live.pid == os.getpid():
            raise InputError(
                f"loader: {what} in the middle of epoch {self._epoch}; leave the loop first, or close the iterator"
            )

    def _require_current(self, iteration: _Iteration) -> None:
        if iteration.pid != os.getpid():
            raise InputError(
                f"loader: this iteration was begun by process {iteration.pid}, and its reader threads are not in this "
                "one, which was forked; begin an iteration of its own here"
            )
        if self._live is not iteration:
            raise InputError(
                "loader: another iteration of it was begun after this one, and it can stand at one place only; make a "
                "second loader with cache.loader(...)"
            )

    def __iter__(self) -> Iterator[DFlashTargetBatch]:
        iteration = self._live = _Iteration(os.getpid())
        try:
            for batch, done in self._epoch_from_here():
                self._done = done
                yield batch
                self._require_current(iteration)
            self._epoch, self._done = self._epoch + 1, 0
        finally:
            if self._live is iteration:
                self._live = None

    def _epoch_from_here(self) -> Iterator[tuple[DFlashTargetBatch, int]]:
        """What is left of the epoch: each batch with the number of those that are done after it."""
        if not self._resumed:
            self._done = 0
        self._resumed = False
        options, batches, begun = self._options, self._batches(), self._done
        steps = num_steps(batches, begun, options.world_size, options.drop_last)
        lost = 0 if options.drop_last else left_out(batches, begun, options.world_size)
        if lost:
            warnings.warn(f"{lost} samples of epoch {self._epoch} are left out: fewer than ranks", stacklevel=2)
        turns: Iterator[Turn] = (
            batch_rows(batches, begun, step, options.rank, options.world_size, options.drop_last)
            for step in range(steps)
        )
        if options.shuffle_kind != "full":
            turns = self._cache.fetching_ahead(turns, options.window_shards)
        on_host = ((gathered.decoded(), done) for gathered, done in self._read_ahead(turns))
        for batch, done in self._to_device(turns) if self._is_asynchronous else on_host:
            yield batch if options.device is None else batch.to(options.device), done

    def _read_ahead(self, turns: Iterator[tuple[list[np.ndarray], int]]) -> Iterator[tuple[Gathered, int]]:
        """Batches in order, read by threads; at most ``prefetch`` are being read or wait, beside the one given out."""
        options, pool = self._options, self._pool
        pending: deque[tuple[Future[Gathered], int]] = deque()
        started = False
        executor = ThreadPoolExecutor(options.threads, thread_name_prefix="cache-reader")

        def read(rows: list[np.ndarray]) -> Gathered:
            return self._cache.gather(
                rows,
                lengths=self._lengths,
                pack_to=options.pack_to,
                allocate=pool.lease,
                decode=self._decode_on_host,
            )

        try:
            for rows, done in turns:
                pending.append((executor.submit(read, rows), done))
                if not started:
                    # Alone, so that training begins as soon as it can.
                    started = not wait([pending[0][0]]).not_done
                if len(pending) > options.prefetch:
                    future, its_done = pending.popleft()
                    yield future.result(), its_done
            while pending:
                future, its_done = pending.popleft()
                yield future.result(), its_done
        finally:
            # Where the interpreter ends in the middle of an epoch its threads have been joined already.
            if not sys.is_finalizing():
                executor.shutdown(wait=False, cancel_futures=True)

    def _to_device(self, turns: Iterator[tuple[list[np.ndarray], int]]) -> Iterator[tuple[DFlashTargetBatch, int]]:
        """Copy each batch on a side stream while the trainer computes on the one before."""
        device = self._options.device
        assert device is not None
        stream = new_stream(device)
        ahead: deque[tuple[DFlashTargetBatch, Gathered, Any, int]] = deque()
        for number, (host, done) in enumerate(self._read_ahead(turns)):
            with on_stream(device, stream):
                batch = host.to(device).decoded()
                copied = stream.record_event()
            ahead.append((batch, host, copied, done))
            # The first batch at once, from then on with the next one's copy under way.
            if len(ahead) > 1 or number == 0:
                yield _arrived(*ahead.popleft())
        while ahead:
            yield _arrived(*ahead.popleft())

    @cached_property
    def _pool(self) -> BufferPool:
        options = self._options
        longest = options.pack_to or int(self._lengths[self._samples].max())
        # More than all samples together is never needed, however large a batch may be.
        whole = len(self._batches().samples)
        rows = min(options.batch_size or whole, whole)
        tokens = min(rows * longest, options.batch_tokens or rows * longest)
        capacity = self._cache.batch_bytes(tokens, self._decode_on_host)
        return BufferPool(capacity, keep=options.prefetch + 2, device=options.device)

    @property
    def _is_asynchronous(self) -> bool:
        return has_streams(self._options.device)

    @property
    def _decode_on_host(self) -> bool:
        return self._options.decode_on_host or not self._is_asynchronous

    @cached_property
    def _identity(self) -> dict[str, Any]:
        chosen = xxhash.xxh3_64_hexdigest(np.ascontiguousarray(self._samples, np.int64).tobytes())
        weights = self._cache.weights
        return {
            "fingerprint": self._cache.fingerprint,
            "samples": chosen,
            **self._options.order_fields(),
            **({} if weights is None else {"weights": list(weights)}),
            **({"trim": True} if self._options.trim else {}),
        }

    def _batches(self) -> Batches:
        if self._planned is None or self._planned[0] != self._epoch:
            self._planned = (self._epoch, self._plan(self._epoch))
        return self._planned[1]

    def _in_epoch(self, epoch: int) -> np.ndarray:
        """The samples of an epoch: each once, or as often as its cache's weight says."""
        weights = self._cache.weights
        if weights is None:
            return self._samples
        bounds = np.searchsorted(self._samples, np.cumsum([len(part) for part in self._cache.parts])[:-1])
        seed, shuffled = self._options.seed, bool(self._options.shuffle)
        parts = enumerate(zip(np.split(self._samples, bounds), weights, strict=True))
        return np.concatenate([weighted(of, weight, seed, epoch, n, shuffled) for n, (of, weight) in parts])

    def _plan(self, epoch: int) -> Batches:
        options, chosen = self._options, self._in_epoch(epoch)
        rng = random_source(options.seed, epoch)
        if options.shuffle_kind == "full":
            order = chosen[full_order(len(chosen), rng)]
        elif options.shuffle_kind == "window":
            order = chosen[window_order(np.asarray(self._cache.index.shard)[chosen], options.window_shards, rng)]
        else:
            order = chosen
        if options.pack_to is not None:
            return batches_of_packed_rows(
                order, self._lengths, options.pack_to, options.batch_size or 1, options.drop_last
            )
        if options.batch_tokens is not None:
            return batches_by_tokens(order, self._lengths, options.batch_tokens, rng if options.shuffle else None)
        return batches_by_count(order, options.batch_size or 1, options.drop_last)


def default_rank() -> tuple[int, int]:
    """(rank, world_size): of torch.distributed if it is set up, else of torchrun's environment, else (0, 1)."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def _require_from_zero(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0:
        raise InputError(f"loader: {name} is {value!r}; it must be a whole number of at least 0")


def _field(state: Any, name: str) -> Any:
    if not isinstance(state, Mapping) or name not in state:
        has = ", ".join(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        raise InputError(f"loader: a state without {name} (it is: {has}); pass what state_dict() of a loader gave")
    return state[name]


def _whole_number(state: Any, name: str) -> int:
    value = _field(state, name)
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if isinstance(value, bool) or not 0 <= number < 1 << 63:
        raise InputError(f"loader: the state's {name} is {value!r}; it must be a whole number of at least 0")
    return number


def _require_room(options: LoaderOptions, lengths: np.ndarray) -> None:
    for name in ("pack_to", "batch_tokens"):
        room = getattr(options, name)
        if room is not None and len(lengths) and lengths.max() > room:
            raise InputError(
                f"loader: the longest sample has {lengths.max():,} tokens, more than {name}={room:,}; pass "
                f"max_length={room} to cut such samples, a filter= that leaves them out, or a larger {name}"
            )


def _arrived(batch: DFlashTargetBatch, host: Gathered, copied: Any, done: int) -> tuple[DFlashTargetBatch, int]:
    """A batch that the current stream may use; its host memory is free for the next read once the copy is over."""
    current = current_stream(batch.input_ids.device)
    for field in fields(batch):
        tensor = getattr(batch, field.name)
        if tensor is not None:
            used_on(tensor, current)
    copied.synchronize()
    del host
    return batch, done
