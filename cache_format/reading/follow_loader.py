"""Batches of a cache that is being written: some shards at a time, a loader for each few of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from cache_format.batch import DFlashTargetBatch
from cache_format.errors import InputError, NothingLeftError
from cache_format.reading.batch_source import BatchSource
from cache_format.reading.loader import CacheLoader


class Followed(Protocol):
    """What the batches come from: ``follow.FollowedCache``."""

    @property
    def epoch(self) -> int: ...

    def sources(self, window_shards: int) -> Iterator[BatchSource]: ...

    def seek(self, epoch: int) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class FollowLoader:
    """An iterable of :class:`DFlashTargetBatch`; every iteration is one epoch, or what is left of it.

    An iteration that was left, by an error too, goes on where it was left. Made by ``FollowedCache.loader``. It has
    no length: how many batches there are is not known before the last shard is there.
    """

    def __init__(self, cache: Followed, window_shards: int, make: Callable[[BatchSource], CacheLoader]):
        if type(window_shards) is not int or window_shards < 1:
            raise InputError(f"loader: window_shards is {window_shards!r}; it must be a whole number of at least 1")
        self._cache, self._window_shards, self._make = cache, window_shards, make
        self._loader: CacheLoader | None = None
        self._resume: Mapping[str, Any] | None = None

    @property
    def epoch(self) -> int:
        """That is, or will next be, iterated over."""
        return self._cache.epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; naming the one it stands in keeps its place.

        Raises:
            InputError: not a whole number of at least 0.
        """
        if epoch != self.epoch:
            self._cache.seek(epoch)
            self._loader = self._resume = None

    def __iter__(self) -> Iterator[DFlashTargetBatch]:
        if self._loader is not None:
            self._resume = self._loader.state_dict()
        for source in self._cache.sources(self._window_shards):
            try:
                self._loader = self._make(source)
            except NothingLeftError as error:
                warnings.warn(f"some shards are passed over: {error}", stacklevel=2)
                continue
            self._loader.set_epoch(self.epoch)
            if self._resume is not None:
                self._loader.load_state_dict(dict(self._resume))
                self._resume = None
            yield from self._loader
            self._loader = None

    def state_dict(self) -> dict[str, Any]:
        """Where the training stands: all batches given out so far count as done. Plain numbers and strings.

        Every rank has the same state after the same number of steps; any one of them serves all, and any number.
        """
        inner = self._resume if self._loader is None else self._loader.state_dict()
        return {**self._cache.state_dict(), "window_shards": self._window_shards, "window": inner}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken.

        Raises:
            MismatchError: it is of another cache; at the next iteration: of another order.
            InputError: it is no state, or of another ``window_shards``.
        """
        if state.get("window_shards") != self._window_shards:
            raise InputError(
                f"loader: the state is of window_shards={state.get('window_shards')!r}, this loader has "
                f"{self._window_shards}; make it with the options of that run"
            )
        self._cache.load_state_dict(state)
        self._loader, self._resume = None, state.get("window")
