"""Compare two caches of the same samples, token by token: python scripts/compare_caches.py A B --within 2e-6"""

from __future__ import annotations

import argparse
import sys

import torch

from cache_format import FeatureCache


def largest_difference(one: FeatureCache, other: FeatureCache) -> float:
    """Of a token's states of a layer, as a share of their norm.

    Raises:
        ValueError: not the same samples.
    """
    worst = 0.0
    for mine, theirs in zip(one, other, strict=True):
        if not torch.equal(mine.input_ids, theirs.input_ids):
            raise ValueError("the caches are not of the same samples")
        a, b = (x.hidden_states.float().view(-1, one.hidden_size) for x in (mine, theirs))
        worst = max(worst, float(((a - b).norm(dim=-1) / b.norm(dim=-1)).max()))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the states of two caches.")
    parser.add_argument("caches", nargs=2)
    parser.add_argument("--within", type=float, required=True, help="largest difference, as a share of a token's norm")
    args = parser.parse_args()
    one, other = map(FeatureCache.open, args.caches)
    found = largest_difference(one, other)
    print(f"{args.caches[0]} and {args.caches[1]}: {found:.2g} apart, {args.within:.2g} allowed")
    sys.exit(not found <= args.within)


if __name__ == "__main__":
    main()
