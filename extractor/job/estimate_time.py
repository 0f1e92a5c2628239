"""estimate: how long an extraction takes, from a rate that is stated or measured on a few of its own batches."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cache_format.codecs.dtypes import torch_dtype
from cache_format.device import synchronize
from cache_format.errors import InputError
from extractor.config import ExtractOptions
from extractor.job.plan import Plan, ShardPlan
from extractor.target.backend import TargetBackend
from extractor.target.load_backend import load_backend
from extractor.target.load_target import resolve_device
from extractor.terminal.progress import duration, say

BATCHES = 8
"""Batches that are timed, after one that is not."""


@dataclass(frozen=True, kw_only=True)
class TimeEstimate:
    """Of the target alone, run by one worker; several divide the hours and need as many times the disk's rate."""

    tokens_per_second: float
    """real tokens, without padding"""
    measured: bool
    """by --calibrate, else stated"""
    hours: float
    gpu_hours: float
    """times the devices that a copy of the target is on"""
    disk_gb_per_second: float
    """that each worker writes"""


def time_estimate(rate: float, tokens: int, shard_bytes: int, *, devices: int, measured: bool) -> TimeEstimate:
    """Of ``tokens`` tokens that become ``shard_bytes``, at ``rate`` tokens a second."""
    hours = tokens / rate / 3600
    return TimeEstimate(
        tokens_per_second=rate,
        measured=measured,
        hours=hours,
        gpu_hours=hours * devices,
        disk_gb_per_second=shard_bytes / max(tokens, 1) * rate / 1e9,
    )


def require_rate(tokens_per_second: float | None, calibrate: bool) -> None:
    """Refuse what cannot be meant.

    Raises:
        InputError: a rate that is none, or one that is stated and to be measured.
    """
    if tokens_per_second is not None and calibrate:
        raise InputError("--calibrate measures what --tokens-per-second states; give one of them")
    if tokens_per_second is not None and not 0 < tokens_per_second < float("inf"):
        raise InputError(f"--tokens-per-second {tokens_per_second:g}: must be more than 0")


def measured_rate(
    options: ExtractOptions, dtype: str, layer_ids: list[int], ids: Sequence[np.ndarray], plan: Plan
) -> float:
    """Real tokens a second of the target, which is loaded for it, over batches spread over the plan.

    Args:
        options: of the extraction.
        dtype: of the states.
        layer_ids: to capture.
        ids: input_ids of the samples that were read; sample i of ``plan`` is the (i mod len)-th of them.
        plan: of the whole extraction.

    Raises:
        InputError: the target cannot be loaded.
    """
    device = resolve_device(options.target.device)
    say(f"loading target {options.target.name} ({dtype}) on {device}")
    backend = load_backend(
        options,
        dtype=torch_dtype(dtype),
        device=device,
        target_layer_ids=layer_ids,
        longest=max(map(len, ids)),
        group=None,
    )
    numbers = np.unique(np.linspace(0, len(plan) - 1, BATCHES).astype(int)).tolist()
    shards = [plan.shard(number) for number in numbers]
    batches = [(shard, batch) for shard in shards for batch in shard.batches]
    chosen = [batches[at] for at in np.unique(np.linspace(0, len(batches) - 1, BATCHES).astype(int)).tolist()]
    shard, batch = chosen[0]
    _seconds(backend, shard, batch, ids, device)
    seconds = sum(_seconds(backend, shard, batch, ids, device) for shard, batch in chosen)
    return sum(int(shard.num_tokens[batch].sum()) for shard, batch in chosen) / seconds


def _seconds(
    backend: TargetBackend, shard: ShardPlan, batch: slice, ids: Sequence[np.ndarray], device: torch.device
) -> float:
    """One batch, from its ids to checked states."""
    lengths = shard.num_tokens[batch].tolist()
    input_ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    for row, sample in enumerate(shard.sample_ids[batch].tolist()):
        input_ids[row, : lengths[row]] = torch.from_numpy(ids[sample % len(ids)].astype(np.int64))
    where = backend.rows_device(device)
    out, extra = backend.row_memory(sum(lengths), where)
    synchronize(device)
    began = time.perf_counter()
    backend.forward(input_ids.to(where), lengths, out, extra)
    backend.nonfinite(out, lengths, extra).any().item()
    synchronize(device)
    return time.perf_counter() - began


def described(found: TimeEstimate) -> list[tuple[str, str]]:
    """Lines for a person."""
    how = "measured on a few batches here" if found.measured else "as stated"
    return [
        ("rate", f"{found.tokens_per_second:,.0f} tok/s a worker, {how}; of the target alone"),
        (
            "time",
            f"{duration(3600 * found.hours)} with one worker, {duration(3600 * found.hours / 8)} with eight; "
            f"{found.gpu_hours:,.2f} GPU-hours",
        ),
        ("disk", f"{found.disk_gb_per_second:.3g} GB/s for each worker, or the disk decides the time"),
    ]
