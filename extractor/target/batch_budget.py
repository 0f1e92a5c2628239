"""``--batch-tokens auto``: the largest forward pass that fits the device, found by trying before anything is planned.

Which samples share a batch can change the rounding of their states, so the plan's batches are part of the fingerprint
and are fixed before the first shard: the number found here is written into the manifest, and a resume takes it from
there, on whatever device. A batch is never made smaller later. Where one does not fit after all, memory that the
allocator holds is given back and the same batch is tried again; if that fails the run ends, and finished shards stay.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from cache_format.device import forget_peak, has_streams, peak_share, release_memory, synchronize
from extractor.config import DEFAULT_BATCH_TOKENS
from extractor.target.backend import TargetBackend

MOST_BATCH_TOKENS = 131_072
"""Larger passes are no faster: matrices of this many rows keep any device busy."""

USABLE_SHARE = 0.85
"""Of the device's memory: other shapes of the same size need a little more or less."""


def largest_fitting(fits: Callable[[int], bool], most: int) -> int:
    """The largest of 8192, 16384, ... up to ``most`` that ``fits``, all smaller ones fitting too; else 8192 halved
    until it fits, 256 at the least.
    """
    tokens = DEFAULT_BATCH_TOKENS
    while tokens > 256 and not fits(tokens):
        tokens //= 2
    if tokens == DEFAULT_BATCH_TOKENS:
        while tokens * 2 <= min(most, MOST_BATCH_TOKENS) and fits(tokens * 2):
            tokens *= 2
    return tokens


def find_batch_tokens(backend: TargetBackend, device: torch.device, longest: int, most: int) -> int:
    """Tokens of a batch for a target on ``device``; 8192 on the CPU, where memory is not what limits it.

    Args:
        longest: tokens of the longest sample.
        most: tokens of the largest shard, which no batch crosses the end of.
    """
    if not has_streams(device):
        return DEFAULT_BATCH_TOKENS

    def fits(tokens: int) -> bool:
        rows = max(1, tokens // longest)
        release_memory(device)
        forget_peak(device)
        try:
            run_once(backend, rows, longest, device)
        except torch.OutOfMemoryError:
            return False
        finally:
            synchronize(device)
        return peak_share(device) <= USABLE_SHARE

    found = largest_fitting(fits, most)
    release_memory(device)
    return found


def run_once(backend: TargetBackend, rows: int, longest: int, device: torch.device) -> None:
    """One pass over ``rows`` rows of ``longest`` tokens with all that a run needs beside it, captures included."""
    # Two memories: one is copied to the host while the other is filled.
    (out, extra), _other = (backend.row_memory(rows * longest, device) for _ in range(2))
    input_ids = torch.zeros(rows, longest, dtype=torch.int64, device=device)
    backend.forward(input_ids, [longest] * rows, out, extra)
    backend.nonfinite(out, [longest] * rows, extra)
