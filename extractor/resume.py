"""What is left to do: which planned shards are not there yet, and whether those that are there are the planned ones."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from cache_format.errors import CacheError
from cache_format.manifest import Manifest
from cache_format.shard import ShardFile, ShardSchema, shard_name
from cache_format.storage import inside
from extractor.plan import Plan, ShardPlan


def require_all_files(cache: Path, manifest: Manifest) -> None:
    """Whether a cache of state complete still has every file: a repair may have been killed, or a file lost.

    Raises:
        CacheError: one is missing.
    """
    assert manifest.totals is not None
    for name in (*manifest.files, *map(shard_name, range(manifest.totals.shards))):
        if not (cache / name).exists():
            raise CacheError(cache / name, f"is missing; {way_out(cache)}")


def missing_shards(cache: Path, schema: ShardSchema, plan: Plan, numbers: Iterable[int]) -> list[int]:
    """Those of the shards ``numbers`` still to be made. Reads the heads of the others, not their states.

    Raises:
        CacheError: a shard that is there is damaged, or holds other samples than planned.
    """
    missing = []
    for number in numbers:
        path = cache / shard_name(number)
        if not os.path.lexists(path):
            missing.append(number)
            continue
        try:
            with ShardFile(inside(cache, shard_name(number)), schema, number) as shard:
                if not _as_planned(shard, plan.shard(number)):
                    raise CacheError(path, "holds other samples than planned")
        except CacheError as error:
            raise CacheError(path, f"{error.problem}; {way_out(cache)}") from None
    return missing


def way_out(cache: Path | str) -> str:
    """What to do about a damaged cache."""
    return f"run `dflash-cache repair {cache}`, then this command again"


def _as_planned(shard: ShardFile, planned: ShardPlan) -> bool:
    """Same samples, lengths and order; quarantined ones may be left out."""
    kept = np.isin(planned.sample_ids, shard.sample_ids)
    same_ids = np.array_equal(planned.sample_ids[kept], shard.sample_ids)
    return same_ids and np.array_equal(planned.num_tokens[kept], np.diff(shard.cu_seqlens))
