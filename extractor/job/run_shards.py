"""Shard by shard: batches through the target, rows to their place in a shard buffer, the file written behind the next.

Host memory is bounded: three shard buffers and one batch, whatever the dataset's size, and with a codec that works on
the host two more. While the target works on one shard, background threads encode, checksum and commit those before,
the samples of a shard on all cores that are left; with all buffers busy the target waits for the disk.
On a device with streams the rows of a batch leave on one of their own while the next batch runs.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache_format.codecs import RawCodec, RowCodec
from cache_format.codecs.dtypes import DTYPES
from cache_format.device import (
    CPU,
    current_stream,
    event_to_sleep_for,
    has_streams,
    new_stream,
    on_stream,
    synchronize,
    to_host,
    used_on,
)
from cache_format.errors import DFlashCacheError
from cache_format.layout.samples import PreparedSamples
from cache_format.layout.shard_layout import ShardSchema, shard_name
from cache_format.writing.encode import encode_buffer
from cache_format.writing.shard_buffer import ShardBuffer
from extractor.job.plan import Plan, ShardPlan
from extractor.job.timeline import Timeline
from extractor.target.backend import TargetBackend

NUM_BUFFERS = 3
"""One being filled, two being written."""


class NonFiniteError(DFlashCacheError):
    """The target gave NaN or Inf for a sample."""


class DeviceMemoryError(DFlashCacheError):
    """A batch does not fit into the device's memory."""


@dataclass
class RunStats:
    """What a run did; times in seconds."""

    shards: int = 0
    samples: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    bytes: int = 0
    seconds: float = 0.0
    seconds_waiting_for_disk: float = 0.0
    """the target stood still because every buffer was still being written"""
    seconds_writing: float = 0.0
    """checksums, writes and syncs, beside the target's work; of all writer threads together"""
    seconds_to_first_batch: float = 0.0
    """from the start of the command to the first batch given to the target"""

    def add(self, other: RunStats) -> None:
        """Count the work of another worker of the same job; ``seconds`` is that of the slowest."""
        for name in ("shards", "samples", "tokens", "padded_tokens", "bytes"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("seconds", "seconds_waiting_for_disk", "seconds_writing", "seconds_to_first_batch"):
            setattr(self, name, max(getattr(self, name), getattr(other, name)))


def added(parts: Iterable[RunStats]) -> RunStats:
    """What all workers of a job did together."""
    total = RunStats()
    for part in parts:
        total.add(part)
    return total


@dataclass(frozen=True, slots=True)
class _ShardEnd:
    """What is known of a shard once its last batch was given to the device; on the host after ``arrived``."""

    nonfinite: Tensor
    """bool ``[n, checked]``"""
    energy: Tensor | None
    """float64 ``[T, 2, L]``: what a lossy codec measured of each token"""
    arrived: Any
    """event; None: it is there"""


@dataclass(frozen=True, kw_only=True)
class ShardRunner:
    """Makes shards of one cache: the same plan, samples and target give the same bytes."""

    cache: Path
    schema: ShardSchema
    plan: Plan
    samples: PreparedSamples
    backend: TargetBackend
    device: torch.device
    on_nonfinite: str
    """``fail``, or ``quarantine``: leave the sample out of its shard"""
    timeline: Timeline = field(default_factory=Timeline)
    on_commit: Callable[[int], None] | None = None
    """called by the writer threads with each shard that is committed; the next one of its thread waits for it"""
    _thread: threading.local = field(default_factory=threading.local, init=False, repr=False)

    def run(self, numbers: Iterable[int], report: Callable[[RunStats], None] = lambda stats: None) -> RunStats:
        """Make and commit shards ``numbers``, in that order; ``report`` is called after every batch.

        Raises:
            NonFiniteError: with ``on_nonfinite="fail"``, naming sample and layer.
            DeviceMemoryError: a batch does not fit the device, also with all other memory given back.
            StorageError: a shard could not be written. Those committed before stay.
        """
        numbers = list(numbers)
        if not numbers:
            return RunStats()
        with self.begin(numbers, report) as making:
            for number in numbers:
                making.make(number)
        return making.stats

    def begin(self, numbers: list[int], report: Callable[[RunStats], None] = lambda stats: None) -> Making:
        """A context to make any of the shards ``numbers`` in, one after another, as they are asked for."""
        return Making(self, numbers, report)

    def _fill(
        self,
        buffer: ShardBuffer,
        shard: ShardPlan,
        device_rows: _DeviceRows,
        stats: RunStats,
        started: float,
        report: Callable[[RunStats], None],
    ) -> _ShardEnd:
        """Run the target over one shard; its rows are in host memory when what is returned has arrived."""
        buffer.begin(self._filled, shard.number, shard.sample_ids, shard.num_tokens)
        stored = {tensor.name: buffer.tensor(tensor.name) for tensor in self._filled.token_tensors}
        nonfinite = []
        for batch in shard.batches:
            lengths = shard.num_tokens[batch]
            first, last = int(buffer.cu_seqlens[batch.start]), int(buffer.cu_seqlens[batch.stop])
            with self.timeline.span("collate"):
                input_ids = self._collate(shard.sample_ids[batch], lengths, stored, first)
            places = {name: tensor[first:last] for name, tensor in stored.items()}
            rows, extra = device_rows.take(places)
            with self.timeline.device_span("forward", self.device):
                self.forward(input_ids, lengths.tolist(), rows, extra, shard.number)
            with self.timeline.device_span("check", self.device):
                nonfinite.append(self.backend.nonfinite(rows, lengths.tolist(), extra))
            device_rows.leave(places, self.timeline)
            stats.samples += len(lengths)
            stats.tokens += last - first
            stats.padded_tokens += input_ids.numel()
            stats.seconds = time.monotonic() - started
            report(stats)
        return device_rows.leave_last(torch.cat(nonfinite))

    def forward(
        self, input_ids: Tensor, lengths: list[int], rows: Tensor, extra: dict[str, Tensor], number: int
    ) -> None:
        """Run the target over one batch of shard ``number``, a second time if it did not fit into memory.

        Raises:
            DeviceMemoryError: it does not fit the second time.
        """
        try:
            self.backend.forward(input_ids.to(self.device, non_blocking=True), lengths, rows, extra)
            return
        except torch.OutOfMemoryError as error:
            if not self.backend.repeatable:
                raise self._too_large(input_ids, number, error) from None
        # Only here is the error gone, and with its traceback what the pass held.
        synchronize(self.device)
        self.backend.release_memory(self.device)
        try:
            self.backend.forward(input_ids.to(self.device), lengths, rows, extra)
        except torch.OutOfMemoryError as error:
            raise self._too_large(input_ids, number, error) from None

    def _too_large(self, input_ids: Tensor, number: int, error: Exception) -> DeviceMemoryError:
        return DeviceMemoryError(
            f"shard {number}: a batch of {input_ids.numel():,} tokens does not fit into the memory of "
            f"{self.device} ({error}). Finished shards are kept: run the same command on a device with more free "
            "memory, or begin another cache with a smaller --batch-tokens; the batches of a cache never change."
        )

    def _collate(self, sample_ids: np.ndarray, lengths: np.ndarray, stored: dict[str, Tensor], first: int) -> Tensor:
        """input_ids ``[B, S]`` int64, right-padded with 0; ids and loss masks also go to their rows in the shard."""
        input_ids = torch.zeros(len(lengths), int(lengths.max()), dtype=torch.int64)
        for row, sample_id in enumerate(sample_ids):
            sample = self.samples[int(sample_id)]
            stop = first + len(sample.input_ids)
            stored["input_ids"].numpy()[first:stop] = sample.input_ids
            stored["loss_mask"].numpy()[first:stop] = sample.loss_mask
            input_ids[row, : len(sample.input_ids)] = stored["input_ids"][first:stop]
            first = stop
        return input_ids.pin_memory() if has_streams(self.device) else input_ids

    def _finish(
        self,
        buffer: ShardBuffer,
        shard: ShardPlan,
        end: _ShardEnd,
        free: queue.LifoQueue[ShardBuffer],
        encoders: Executor | None,
    ) -> tuple[int, float]:
        """Writer thread: check, commit, give the buffer back; returns the file's bytes and the seconds it took."""
        if end.arrived is not None:
            with self.timeline.span("wait for the device"):
                end.arrived.synchronize()
        started = time.monotonic()
        kept, dropped = buffer, end.nonfinite.any(dim=1).numpy()
        if dropped.any():
            self._refuse_unless_quarantined(shard, end.nonfinite)
            kept = kept.without(dropped)
        if end.energy is not None:
            of_kept = torch.from_numpy(np.repeat(~dropped, shard.num_tokens))
            kept.put_energy(end.energy[of_kept])
        if self.schema.has_blocks:
            with self.timeline.span("encode"):
                # Memory that each writer thread uses again.
                into = getattr(self._thread, "encoded", None)
                kept = self._thread.encoded = encode_buffer(kept, self.schema, into, encoders)
        with self.timeline.span("checksum and write"):
            num_bytes = kept.commit(self.cache / shard_name(shard.number), read_next=self.on_commit is not None)
        free.put(buffer)
        if self.on_commit is not None:
            with self.timeline.span("upload"):
                self.on_commit(shard.number)
        return num_bytes, time.monotonic() - started

    @property
    def _filled(self) -> ShardSchema:
        """Of the buffers that the target fills: codecs that work on the host come after it."""
        return self.schema.raw if self.schema.has_blocks else self.schema

    def _refuse_unless_quarantined(self, shard: ShardPlan, bad: Tensor) -> None:
        if self.on_nonfinite == "quarantine":
            return
        position, column = bad.nonzero()[0].tolist()
        sample_id = int(shard.sample_ids[position])
        raise NonFiniteError(
            f"sample {sample_id} (dataset row {self.samples.source_rows[sample_id]}, shard {shard.number}): the target "
            f"gave NaN or Inf at {self.backend.checked[column]}; nothing of this shard was stored. "
            "Try --dtype bfloat16 or float32, or --on-nonfinite quarantine to leave such samples out and list them."
        )


class Making:
    """Shards being made: ``make`` returns once the device has a shard's last batch, its file is written meanwhile.

    A context manager; leaving it waits for the files. One thread at a time may call ``make``.
    """

    def __init__(self, runner: ShardRunner, numbers: list[int], report: Callable[[RunStats], None]):
        self.stats = RunStats()
        self._runner, self._report, self._started = runner, report, time.monotonic()
        largest = int(runner.plan.shard_bytes(runner._filled)[numbers].max())
        self._free: queue.LifoQueue[ShardBuffer] = queue.LifoQueue()
        for _ in range(min(NUM_BUFFERS, len(numbers))):
            self._free.put(ShardBuffer(largest, runner.device))
        self._rows = _DeviceRows(runner._filled, runner.device, runner.plan.most_batch_tokens)
        self._writing: deque[Future[tuple[int, float]]] = deque()
        self._writer = ThreadPoolExecutor(NUM_BUFFERS - 1, thread_name_prefix="shard-writer")
        self._encoders = None
        if runner.schema.has_blocks:
            # The target's thread and a writer have a core each.
            self._encoders = ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 2), thread_name_prefix="encoder")

    def make(self, number: int) -> Future[tuple[int, float]]:
        """Run the target over shard ``number``; gives the file's bytes, and the seconds it took, once it is committed.

        Raises:
            DFlashCacheError: as :meth:`ShardRunner.run`, also for a shard before this one.
        """
        waiting, stats, runner = time.monotonic(), self.stats, self._runner
        with runner.timeline.span("wait for a buffer"):
            while self._writing and (self._writing[0].done() or len(self._writing) >= NUM_BUFFERS):
                _count_written(stats, self._writing.popleft())
            buffer = self._free.get()
        if not self._rows.busy():
            stats.seconds_waiting_for_disk += time.monotonic() - waiting
        shard = runner.plan.shard(number)
        end = runner._fill(buffer, shard, self._rows, stats, self._started, self._report)
        stats.shards += 1
        written = self._writer.submit(runner._finish, buffer, shard, end, self._free, self._encoders)
        self._writing.append(written)
        return written

    def __enter__(self) -> Making:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        with self._encoders or nullcontext(), self._writer:
            if kind is None:
                self._finish_all()

    def _finish_all(self) -> None:
        stats, waiting = self.stats, time.monotonic()
        self._rows.synchronize()
        computed = time.monotonic()
        for future in self._writing:
            _count_written(stats, future)
        stats.seconds_waiting_for_disk += time.monotonic() - max(waiting, computed)
        stats.seconds = time.monotonic() - self._started
        self._report(stats)


class _DeviceRows:
    """Memory on the device for the rows of a batch, and their way out of it.

    On a device with streams two such memories take turns: while one is copied to page-locked host memory on a side
    stream, the target fills the other. On the CPU raw states are written to their place in the shard at once.
    """

    def __init__(self, schema: ShardSchema, device: torch.device, most_tokens: int):
        self._schema, self._device = schema, device
        self._in_place = device.type == CPU.type and isinstance(schema.codec, RawCodec)
        self._stream: Any = new_stream(device) if has_streams(device) else None
        self._copied: list[Any] = [None, None]
        self._turn = 0
        self._memories = [] if self._in_place else [self._memory(most_tokens) for _ in range(2 if self._stream else 1)]
        self._taken: dict[str, Tensor] = {}
        self._energy: list[Tensor] = []

    def take(self, places: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Where to put hidden_states ``[n, L*H]`` and the captures of a batch whose rows belong to ``places``."""
        captures = [tensor.name for tensor in self._schema.captures]
        if self._in_place:
            return places["hidden_states"], {name: places[name] for name in captures}
        tokens = len(places["input_ids"])
        self._turn = (self._turn + 1) % len(self._memories)
        copied = self._copied[self._turn]
        if copied is not None:
            current_stream(self._device).wait_event(copied)
        self._taken = {name: tensor[:tokens] for name, tensor in self._memories[self._turn].items()}
        return self._taken["hidden_states"], {name: self._taken[name] for name in captures}

    def leave(self, places: dict[str, Tensor], timeline: Timeline) -> None:
        """Encode what :meth:`take` gave and copy it to ``places``, with streams behind the next batch."""
        if self._in_place:
            return
        if self._stream is None:
            self._encode(places)
            return
        self._stream.wait_stream(current_stream(self._device))
        with on_stream(self._device, self._stream), timeline.device_span("copy", self._device):
            self._encode(places)
        self._copied[self._turn] = self._stream.record_event()

    def leave_last(self, nonfinite: Tensor) -> _ShardEnd:
        """Copy what is known of the shard to the host, behind all its rows."""
        energies, self._energy = self._energy, []
        if self._stream is None:
            return _ShardEnd(nonfinite, torch.cat(energies) if energies else None, None)
        self._stream.wait_stream(current_stream(self._device))
        with on_stream(self._device, self._stream):
            used_on(nonfinite, self._stream)
            host = to_host(nonfinite)
            energy = to_host(torch.cat(energies)) if energies else None
        return _ShardEnd(host, energy, event_to_sleep_for(self._device, self._stream))

    def busy(self) -> bool:
        """Whether the device still has work that it was given."""
        return self._stream is not None and not current_stream(self._device).query()

    def synchronize(self) -> None:
        """Wait until the device has done all that it was given."""
        if self._stream is not None:
            self._stream.synchronize()

    def _encode(self, places: dict[str, Tensor]) -> None:
        codec = self._schema.codec
        assert isinstance(codec, RowCodec)
        energy = codec.encode(self._taken["hidden_states"], places, self._schema.states)
        if energy is not None:
            self._energy.append(energy)
        for tensor in self._schema.captures:
            places[tensor.name].copy_(self._taken[tensor.name], non_blocking=True)

    def _memory(self, tokens: int) -> dict[str, Tensor]:
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        shapes["hidden_states"] = ((tokens, self._schema.states.width), self._schema.states.dtype)
        shapes |= {tensor.name: (tensor.shape(tokens), DTYPES[tensor.dtype]) for tensor in self._schema.captures}
        return {name: torch.empty(shape, dtype=dtype, device=self._device) for name, (shape, dtype) in shapes.items()}


def _count_written(stats: RunStats, future: Future[tuple[int, float]]) -> None:
    num_bytes, seconds = future.result()
    stats.bytes += num_bytes
    stats.seconds_writing += seconds
