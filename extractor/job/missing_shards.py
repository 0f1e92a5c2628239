"""What is left to do: which planned shards are not there yet, and whether those that are there are the planned ones."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from cache_format.errors import CacheError
from cache_format.layout.manifest import Manifest
from cache_format.layout.shard_layout import ShardSchema, shard_name
from cache_format.layout.shard_reader import ShardFile
from cache_format.storage.paths import inside
from extractor.job.plan import Plan


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
        sample_ids, num_tokens = plan.samples_of(number)
        try:
            if _is_exactly(path, schema, number, sample_ids, num_tokens):
                continue
        except FileNotFoundError:
            missing.append(number)
            continue
        try:
            with ShardFile(inside(cache, shard_name(number)), schema, number) as shard:
                if not _as_planned(shard, sample_ids, num_tokens):
                    raise CacheError(path, "holds other samples than planned")
        except CacheError as error:
            raise CacheError(path, f"{error.problem}; {way_out(cache)}") from None
    return missing


def way_out(cache: Path | str) -> str:
    """What to do about a damaged cache."""
    return f"run `dflash-cache repair {cache}`, then this command again"


def _is_exactly(path: Path, schema: ShardSchema, number: int, sample_ids: np.ndarray, num_tokens: np.ndarray) -> bool:
    """Whether size, header, lengths and ids are, byte for byte, what the plan lays down: one read and no parsing.

    False says nothing yet: samples may be quarantined, or the codec may decide sizes. ShardFile looks closer then.

    Raises:
        FileNotFoundError: there is no such shard.
    """
    try:
        # A link is looked at more closely, too.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    except FileNotFoundError:
        raise
    except OSError:
        return False
    try:
        if schema.has_blocks:
            return False
        ends = np.cumsum(num_tokens)
        container = schema.layout(number, len(sample_ids), int(ends[-1]))
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size != container.num_bytes:
            return False
        cu_seqlens = np.concatenate([[0], ends]).astype("<i8")
        expected = container.header + cu_seqlens.tobytes() + sample_ids.astype("<i8").tobytes()
        return os.pread(fd, len(expected), 0) == expected
    except OSError:
        return False
    finally:
        os.close(fd)


def _as_planned(shard: ShardFile, sample_ids: np.ndarray, num_tokens: np.ndarray) -> bool:
    """Same samples, lengths and order; quarantined ones may be left out."""
    kept = np.isin(sample_ids, shard.sample_ids)
    same_ids = np.array_equal(sample_ids[kept], shard.sample_ids)
    return same_ids and np.array_equal(num_tokens[kept], np.diff(shard.cu_seqlens))
