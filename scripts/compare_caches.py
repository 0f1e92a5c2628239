"""Compare two caches of the same samples, token by token: python scripts/compare_caches.py A B --within 2e-6

With --as C: A is at most twice as far from B as C is.
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch import Tensor

from cache_format import DFlashTargetBatch, FeatureCache


def largest_difference(one: FeatureCache, other: FeatureCache) -> float:
    """Of a token's states of a layer, as a share of their norm.

    Raises:
        ValueError: not the same samples.
    """
    worst = 0.0
    for mine, theirs in zip(one, other, strict=True):
        if not torch.equal(mine.input_ids, theirs.input_ids):
            raise ValueError("the caches are not of the same samples")
        a, b = (_rows(batch, one.hidden_size) for batch in (mine, theirs))
        worst = max(worst, float(((a - b).norm(dim=-1) / b.norm(dim=-1)).max()))
    return worst


def _rows(batch: DFlashTargetBatch, width: int) -> Tensor:
    """``[tokens * L, H]``, and the last hidden states where there are such."""
    rows = batch.hidden_states.float().view(-1, width)
    last = batch.last_hidden_states
    return rows if last is None else torch.cat([rows, last.float().view(-1, width)])


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the states of two caches.")
    parser.add_argument("caches", nargs=2)
    allowed = parser.add_mutually_exclusive_group(required=True)
    allowed.add_argument("--within", type=float, help="largest difference, as a share of a token's norm")
    allowed.add_argument("--as", dest="measure", help="a cache whose own difference from the second is the measure")
    args = parser.parse_args()
    one, other = map(FeatureCache.open, args.caches)
    found = largest_difference(one, other)
    within = args.within or 2 * largest_difference(FeatureCache.open(args.measure), other)
    print(f"{args.caches[0]} and {args.caches[1]}: {found:.2g} apart, {within:.2g} allowed")
    sys.exit(not found <= within)


if __name__ == "__main__":
    main()
