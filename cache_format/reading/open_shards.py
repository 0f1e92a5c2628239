"""The shards that a reader holds open: checked once, mapped, the least recently used closed first."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

from cache_format.codecs.dtypes import DTYPES
from cache_format.errors import CacheError
from cache_format.layout.shard_layout import ShardSchema
from cache_format.layout.shard_reader import ShardFile
from cache_format.storage.byte_source import ByteSource, LocalFile

MAX_OPEN_SHARDS = 128
"""Shards held open at once: well under the usual limit of 1,024 file descriptors."""


class OpenShard:
    """A checked shard and, where it is on this disk, its private memory map."""

    def __init__(
        self, source: ByteSource, schema: ShardSchema, number: int, check: Callable[[ShardFile], None] | None = None
    ):
        """Open shard ``number`` and check it; ``check`` looks further.

        Raises:
            CacheError: it is damaged, or not this shard.
        """
        self.file = ShardFile(source, schema, number)
        if check is not None:
            try:
                check(self.file)
            except BaseException:
                self.file.close()
                raise
        self._map = source.map() if isinstance(source, LocalFile) else None
        if self._map is not None and len(self._map) != self.file.container.num_bytes:
            raise CacheError(source.where, "changed its size while it was opened")

    @property
    def is_removed(self) -> bool:
        """Whether its file has no name any more."""
        return isinstance(self.file.source, LocalFile) and self.file.source.is_removed

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a per-token tensor, without a copy where the file is mapped."""
        place = self.file.container.places[name]
        offset, size = self.file.row_range(name, start, stop)
        if self._map is not None:
            count = size // place.itemsize
            flat = torch.frombuffer(self._map, dtype=DTYPES[place.dtype], count=count, offset=offset)
        else:
            flat = torch.empty(size, dtype=torch.uint8)
            self.file.read_into(offset, flat.numpy())
            flat = flat.view(DTYPES[place.dtype])
        return flat.view(stop - start, *place.shape[1:])


class OpenShards:
    """Open shards by number. Threads may share it; a forked process begins with the same shards and its own locks."""

    def __init__(self, schema: ShardSchema, *, may_vanish: bool):
        """``may_vanish``: files may be removed while they are open; such a shard is let go, to free the disk."""
        self._schema, self._may_vanish = schema, may_vanish
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._begin()

    def _begin(self) -> None:
        self._lock, self._pid = threading.Lock(), os.getpid()
        self._opening: dict[int, threading.Lock] = {}

    def get(
        self, number: int, source: Callable[[int], ByteSource], check: Callable[[ShardFile], None] | None = None
    ) -> OpenShard:
        """Shard ``number``; if it is not open, from what ``source`` gives for it, and ``check`` has looked at.

        Raises:
            CacheError: it is missing, damaged, or not this shard.
        """
        if self._pid != os.getpid():
            # A thread of the parent may have held the lock when a DataLoader worker was forked off.
            self._begin()
        with self._lock:
            if number in self._open:
                self._open.move_to_end(number)
                return self._open[number]
            opening = self._opening.setdefault(number, threading.Lock())
        # One at a time for each shard, others meanwhile: it may have to be downloaded.
        with opening:
            shard = self._open.get(number) or OpenShard(source(number), self._schema, number, check)
            with self._lock:
                self._open[number] = shard
                self._opening.pop(number, None)
                # Not closed here: another thread may be reading it. It closes with its last user.
                while len(self._open) > MAX_OPEN_SHARDS:
                    self._open.popitem(last=False)
                if self._may_vanish:
                    for gone in [n for n, other in self._open.items() if other.is_removed]:
                        del self._open[gone]
        return shard
