"""Shard by shard: batches through the target, rows to their place in a shard buffer, the file written behind the next.

Host memory is bounded: two shard buffers and one batch, whatever the dataset's size. While the target works on one
shard, a background thread checksums and commits the one before; with both buffers busy the target waits for the disk.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cache_format.errors import DFlashCacheError
from cache_format.samples import PreparedSamples
from cache_format.shard import ShardBuffer, ShardSchema, shard_name
from extractor.forward import HiddenStateExtractor
from extractor.plan import Plan, ShardPlan

NUM_BUFFERS = 2


class NonFiniteError(DFlashCacheError):
    """The target gave NaN or Inf for a sample."""


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


@dataclass(frozen=True, kw_only=True)
class ShardRunner:
    """Makes shards of one cache: the same plan, samples and target give the same bytes."""

    cache: Path
    schema: ShardSchema
    plan: Plan
    samples: PreparedSamples
    extractor: HiddenStateExtractor
    device: torch.device
    on_nonfinite: str
    """``fail``, or ``quarantine``: leave the sample out of its shard"""

    def run(self, numbers: Iterable[int], report: Callable[[RunStats], None] = lambda stats: None) -> RunStats:
        """Make and commit shards ``numbers``, in that order; ``report`` is called after every batch.

        Raises:
            NonFiniteError: with ``on_nonfinite="fail"``, naming sample and layer.
            StorageError: a shard could not be written. Those committed before stay.
        """
        numbers = list(numbers)
        stats, started = RunStats(), time.monotonic()
        if not numbers:
            return stats
        largest = int(self.plan.shard_bytes(self.schema)[numbers].max())
        free: queue.SimpleQueue[ShardBuffer] = queue.SimpleQueue()
        for _ in range(min(NUM_BUFFERS, len(numbers))):
            free.put(ShardBuffer(largest, pin_memory=self.device.type == "cuda"))
        writing: list[Future[int]] = []
        with ThreadPoolExecutor(1, thread_name_prefix="shard-writer") as writer:
            for number in numbers:
                waiting = time.monotonic()
                while len(writing) >= NUM_BUFFERS or (writing and writing[0].done()):
                    stats.bytes += writing.pop(0).result()
                buffer = free.get()
                stats.seconds_waiting_for_disk += time.monotonic() - waiting
                shard = self.plan.shard(number)
                nonfinite, done = self._fill(buffer, shard, stats, started, report)
                stats.shards += 1
                writing.append(writer.submit(self._finish, buffer, shard, nonfinite, done, free))
            waiting = time.monotonic()
            stats.bytes += sum(future.result() for future in writing)
            stats.seconds_waiting_for_disk += time.monotonic() - waiting
        stats.seconds = time.monotonic() - started
        report(stats)
        return stats

    def _fill(
        self,
        buffer: ShardBuffer,
        shard: ShardPlan,
        stats: RunStats,
        started: float,
        report: Callable[[RunStats], None],
    ) -> tuple[list[Tensor], torch.cuda.Event | None]:
        """Run the target over one shard; rows arrive in ``buffer`` once the returned event has happened."""
        buffer.begin(self.schema, shard.number, shard.sample_ids, shard.num_tokens)
        stored = {tensor.name: buffer.tensor(tensor.name) for tensor in self.schema.token_tensors}
        nonfinite = []
        for batch in shard.batches:
            lengths = shard.num_tokens[batch]
            first, last = int(buffer.cu_seqlens[batch.start]), int(buffer.cu_seqlens[batch.stop])
            input_ids = self._collate(shard.sample_ids[batch], lengths, stored, first)
            rows = torch.empty(last - first, self.schema.width, dtype=self.schema.dtype, device=self.device)
            places = {name: tensor[first:last] for name, tensor in stored.items()}
            extra = {t.name: torch.empty_like(places[t.name], device=self.device) for t in self.schema.captures}
            self.extractor.forward(input_ids.to(self.device, non_blocking=True), lengths.tolist(), rows, extra)
            nonfinite.append(self.extractor.nonfinite(rows, lengths.tolist(), extra))
            self.schema.codec.encode(rows, places)
            for name, tensor in extra.items():
                places[name].copy_(tensor, non_blocking=True)
            stats.samples += len(lengths)
            stats.tokens += last - first
            stats.padded_tokens += input_ids.numel()
            stats.seconds = time.monotonic() - started
            report(stats)
        if self.device.type != "cuda":
            return nonfinite, None
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(self.device))
        return nonfinite, done

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
        return input_ids.pin_memory() if self.device.type == "cuda" else input_ids

    def _finish(
        self,
        buffer: ShardBuffer,
        shard: ShardPlan,
        nonfinite: list[Tensor],
        done: torch.cuda.Event | None,
        free: queue.SimpleQueue[ShardBuffer],
    ) -> int:
        """Writer thread: check, commit, give the buffer back; returns the file's size in bytes."""
        if done is not None:
            done.synchronize()
        bad = torch.cat(nonfinite).cpu()
        kept = buffer
        if bad.any():
            self._refuse_unless_quarantined(shard, bad)
            kept = buffer.without(bad.any(dim=1).numpy())
        size = kept.commit(self.cache / shard_name(shard.number))
        free.put(buffer)
        return size

    def _refuse_unless_quarantined(self, shard: ShardPlan, bad: Tensor) -> None:
        if self.on_nonfinite == "quarantine":
            return
        position, column = bad.nonzero()[0].tolist()
        sample_id = int(shard.sample_ids[position])
        raise NonFiniteError(
            f"sample {sample_id} (dataset row {self.samples.source_rows[sample_id]}, shard {shard.number}): the target "
            f"gave NaN or Inf at {self.extractor.checked[column]}; nothing of this shard was stored. "
            "Try --dtype bfloat16 or float32, or --on-nonfinite quarantine to leave such samples out and list them."
        )
