"""A cache read while it is written: its shards in the order of their numbers, each as soon as it is committed.

An epoch is all shards. What was read and is needed no more is told to a writer that keeps a few shards only
(``dflash-cache extract --keep``), which then removes it and makes room for the next.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

from cache_format.errors import CacheError, InputError, MismatchError, WriterStoppedError
from cache_format.layout.follow_files import read_window, write_done
from cache_format.layout.manifest import Manifest
from cache_format.layout.shard_layout import shard_name
from cache_format.reading.batch_source import BatchSource
from cache_format.reading.expect import check_expected
from cache_format.reading.follow_loader import FollowLoader
from cache_format.reading.loader import CacheLoader, default_rank
from cache_format.reading.open_cache import open_some
from cache_format.storage.lock import is_written

POLL_SECONDS, LOOK_SECONDS = 0.01, 1.0
"""How often to look for the next shard, and for its writer."""

Cache = TypeVar("Cache")


class FollowedCache(Generic[Cache]):
    """A cache that is being written. Iterating over it gives each shard as a cache of its own, and waits for the next.

    An iteration is an epoch, and ends after the last shard; the next one is the next epoch. One that was left, by an
    error too, goes on where it was left. Made by ``FeatureCache.open(path, follow=True)``.
    """

    def __init__(
        self,
        path: Path,
        options: Mapping[str, Any],
        make: Callable[[BatchSource], Cache],
        *,
        keep_shards: int = 0,
        patience: float = 60.0,
    ):
        """See ``FeatureCache.open``; ``make`` makes a cache of what is opened."""
        if type(keep_shards) is not int or keep_shards < 0 or not patience >= 0:
            raise InputError(f"open: keep_shards={keep_shards!r}, patience={patience!r}: give numbers of at least 0")
        self.path, self.where, self._options, self._make = path, str(path), options, make
        self._keep_shards, self._patience = keep_shards, patience
        self._rank, self._world_size = default_rank()
        self._turn = 0

    def __repr__(self) -> str:
        done = self._turn % self.num_shards
        return f"FollowedCache({self.where!r}: epoch {self.epoch}, {done} of {self.num_shards} shards read)"

    @cached_property
    def manifest(self) -> Manifest:
        """Of the cache, once its samples are prepared; waits for that.

        Raises:
            WriterStoppedError: nobody prepares them.
            MismatchError: the cache is not what was expected.
        """
        patience = _Patience(self)
        while True:
            manifest = Manifest.find(self.path)
            if manifest is not None and manifest.totals is not None:
                check_expected(self.where, manifest, self._options["expect"])
                return manifest
            patience.wait("there is no planned cache yet")

    @cached_property
    def cache(self) -> Cache:
        """The cache without samples: its manifest, layers and embeddings."""
        return self._make(open_some(self.path, self.manifest, [], self._options))

    @property
    def num_shards(self) -> int:
        """Of an epoch."""
        assert self.manifest.totals is not None
        return self.manifest.totals.shards

    @property
    def epoch(self) -> int:
        """That is, or will next be, iterated over."""
        return self._turn // self.num_shards

    def __iter__(self) -> Iterator[Cache]:
        for source in self.sources(1):
            yield self._make(source)

    def loader(self, batch_size: int | None = None, *, window_shards: int = 4, **options: Any) -> FollowLoader:
        """Batches, each few shards a :class:`CacheLoader` of their own: samples are mixed among ``window_shards``.

        Args:
            batch_size: samples of a batch, or packed rows.
            window_shards: that are waited for, read and done with at a time. Shards have short and long samples alike.
            **options: those of ``FeatureCache.loader``.

        Raises:
            InputError: an option that cannot be; at the iteration: the writer keeps too few shards.
        """

        def of(source: BatchSource) -> CacheLoader:
            cache: Any = self._make(source)
            loader: CacheLoader = cache.loader(batch_size, **options)
            return loader

        return FollowLoader(self, window_shards, of)

    def sources(self, window_shards: int) -> Iterator[BatchSource]:
        """What is left of the epoch, ``window_shards`` at a time.

        Raises:
            WriterStoppedError: the next shard is not there, and nobody has written the cache for ``patience`` seconds.
            CacheError: a shard is damaged.
            InputError: the writer keeps too few shards.
        """
        epoch = self.epoch
        while self.epoch == epoch:
            first = self._turn % self.num_shards
            numbers = range(first, min(first + window_shards, self.num_shards))
            yield self._await(numbers)
            # Only what was read to its end is done: a caller that leaves comes back to it.
            self._turn += len(numbers)
        self._tell(window_shards)

    def seek(self, epoch: int, shards_done: int = 0) -> None:
        """Go on there: after that many shards of that epoch.

        Raises:
            InputError: there are not so many.
        """
        numbers = (epoch, shards_done)
        if any(type(n) is not int or n < 0 for n in numbers) or shards_done >= self.num_shards:
            raise InputError(
                f"{self.where}: no place {shards_done!r} in epoch {epoch!r}: {self.num_shards} shards each"
            )
        self._turn = epoch * self.num_shards + shards_done

    def state_dict(self) -> dict[str, Any]:
        """Where it stands: shards that were read to their end. Plain numbers and strings."""
        shards_done = self._turn % self.num_shards
        return {"fingerprint": self.manifest.fingerprint, "epoch": self.epoch, "shards_done": shards_done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken.

        Raises:
            MismatchError: it is of another cache.
            InputError: it is no state.
        """
        found = (self.manifest.fingerprint, state.get("fingerprint"))
        if found[0] != found[1]:
            raise MismatchError(f"{self.where}: the state is of another cache. Different:", {"fingerprint": found})
        self.seek(state.get("epoch", -1), state.get("shards_done", -1))

    def _await(self, numbers: range) -> BatchSource:
        names = [self.path / shard_name(number) for number in numbers]
        patience = _Patience(self)
        self._tell(len(numbers))
        while True:
            missing = [path for path in names if not path.exists()]
            try:
                if not missing:
                    return open_some(self.path, self.manifest, numbers, self._options)
            except CacheError:
                # It may have gone between the look and the opening: its writer believed an earlier reader.
                if all(path.exists() for path in names):
                    raise
            if patience.wait(f"{missing[0].name if missing else names[0].name} is not there"):
                # The writer may have begun since.
                self._tell(len(numbers))

    def _tell(self, window_shards: int) -> None:
        """Say how far it is, where the writer waits for that."""
        window = read_window(self.path)
        if window is None:
            return
        needed = min(self._keep_shards + window_shards, self.num_shards)
        if window.keep < needed:
            raise InputError(
                f"{self.where}: its writer keeps {window.keep} shards, and {needed} are asked for (keep_shards= and "
                f"window_shards= of a loader); run it with --keep {needed + window_shards}, or ask for fewer"
            )
        write_done(self.path, self._rank, self._world_size, max(0, self._turn - self._keep_shards))


class _Patience:
    """Waiting for a writer, as long as there is one."""

    def __init__(self, cache: FollowedCache[Any]):
        self._cache, self._seen, self._looked = cache, time.monotonic(), time.monotonic()

    def wait(self, problem: str) -> bool:
        """A moment. True where the writer was looked for.

        Raises:
            WriterStoppedError: there has been none for the whole patience.
        """
        time.sleep(POLL_SECONDS)
        now = time.monotonic()
        if now - self._looked < min(LOOK_SECONDS, self._cache._patience):
            return False
        self._looked = now
        if is_written(self._cache.path):
            self._seen = now
        elif now - self._seen >= self._cache._patience:
            raise WriterStoppedError(
                self._cache.path,
                f"{problem}, and nobody has written this cache for {now - self._seen:.0f} s; run its `dflash-cache "
                "extract` command again, then go on here (the same iteration, or load_state_dict in a new process)",
            )
        return True
