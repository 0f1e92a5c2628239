"""Make a cache's shards, each whole and by itself, from states that are there already: another cache's, a peer's."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cache_format.errors import CacheError, InputError
from cache_format.layout.shard_layout import ShardSchema, shard_name
from cache_format.layout.shard_reader import ShardFile
from cache_format.storage.paths import inside
from cache_format.writing.encode import encode_shard


@dataclass(frozen=True, slots=True)
class ShardRows:
    """What goes into a shard, before its codec."""

    sample_ids: np.ndarray
    """int64 ``[n]``, in the order of the rows"""
    num_tokens: np.ndarray
    """int64 ``[n]``"""
    raw: Mapping[str, torch.Tensor]
    """what the shard would hold with the raw codec: a tensor with one row a token for each name; it may be used again
    for the thread's next shard"""


class ShardMaker:
    """Makes shards, in memory that each thread uses again."""

    def __init__(
        self,
        out: Path,
        schema: ShardSchema,
        rows: Callable[[int], ShardRows],
        on_commit: Callable[[int], None] | None = None,
    ):
        """``rows`` gives those of a shard by its number, from any thread.

        ``on_commit`` is called with each shard that stands in ``out``, from any thread.
        """
        self._out, self._schema, self._rows, self._on_commit = out, schema, rows, on_commit
        self._thread = threading.local()

    def make(self, number: int) -> None:
        """Read, encode and commit shard ``number``."""
        rows = self._rows(number)
        into = getattr(self._thread, "buffer", None)
        buffer = self._thread.buffer = encode_shard(
            self._schema, number, rows.sample_ids, rows.num_tokens, rows.raw, into
        )
        buffer.commit(inside(self._out, shard_name(number)), read_next=self._on_commit is not None)
        if self._on_commit is not None:
            self._on_commit(number)

    def make_all(self, numbers: Sequence[int], threads: int, done: Callable[[int], None]) -> None:
        """Make shards ``numbers``, ``threads`` at a time; ``done`` is told each, in this order."""
        with ThreadPoolExecutor(threads, thread_name_prefix="shards") as pool:
            futures = [pool.submit(self.make, number) for number in numbers]
            try:
                for number, future in zip(numbers, futures, strict=True):
                    future.result()
                    done(number)
            finally:
                pool.shutdown(wait=True, cancel_futures=True)


def is_done(out: Path, schema: ShardSchema, number: int, sample_ids: np.ndarray) -> bool:
    """Whether a shard is there.

    Raises:
        CacheError: it is damaged, or holds other samples.
    """
    path = inside(out, shard_name(number))
    if not path.exists():
        return False
    with ShardFile(path, schema, number) as shard:
        if not np.array_equal(shard.sample_ids, sample_ids):
            raise CacheError(path, f"holds other samples than planned; run `dflash-cache repair {out}`, then go on")
    return True


def require_room(out: Path, schema: ShardSchema, missing: Sequence[np.ndarray]) -> None:
    """Refuse to begin what cannot end; ``missing``: the samples' tokens of each shard that is to be made.

    Raises:
        InputError: the disk of ``out`` is too small.
    """
    need = sum(schema.num_bytes(0, len(lengths), int(lengths.sum())) for lengths in missing)
    free = shutil.disk_usage(out).free
    if free < need:
        raise InputError(
            f"{out}: what is missing needs about {need / 1e9:,.1f} GB but the disk has {free / 1e9:,.1f} GB free. Free "
            "some space and run the same command again, or choose an OUT on another disk"
        )
