"""The destination seam: where a cache goes, a folder or a URL. A job knows the steps, this what they mean there.

Order of calls: :meth:`Destination.refuse_foreign`, :meth:`~Destination.manifest`, then :meth:`~Destination.held` around
all that writes (a Ray worker at a URL is covered by its driver's): :meth:`~Destination.begin`, commits, shards,
:meth:`~Destination.seal`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np

from cache_format.layout.manifest import Manifest
from cache_format.layout.shard_layout import ShardSchema
from extractor.job.plan import Plan


class Destination(ABC):
    """Where one worker's part of a cache goes."""

    where: str
    """path or URL of the cache, for messages"""
    folder: Path
    """the local folder in which files are made: the cache itself, or a scratch folder that mirrors it"""
    shared: bool
    """whether all workers of a job see the same ``folder``"""
    poll_seconds: float
    """how often a worker that waits for the leading one looks"""

    @abstractmethod
    def refuse_foreign(self) -> None:
        """Whether a cache may be there; nothing is written.

        Raises:
            InputError: something else is there.
        """

    @abstractmethod
    def manifest(self) -> Manifest | None:
        """The manifest that is there now, whoever wrote it; None where the cache is not begun.

        Raises:
            CacheError: it is damaged.
        """

    @abstractmethod
    def held(self) -> AbstractContextManager[None]:
        """A context in which this job may write there, and no other one.

        Raises:
            LockedError: another one writes.
        """

    @abstractmethod
    def alone(self) -> bool:
        """Whether no other worker of this job writes any more; where it is True, none comes after."""

    @abstractmethod
    def allowed(self) -> None:
        """Whether this job may still write.

        Raises:
            LockedError: another one has taken over.
        """

    @abstractmethod
    def begin(self) -> None:
        """Bring ``folder`` to what is there, but for the shards."""

    @abstractmethod
    def parts_seen(self) -> int:
        """Parts of the prepared samples that can be seen there: a sign of life of the workers that make them."""

    @abstractmethod
    def bring_part(self, number: int) -> None:
        """Have a part of the prepared samples in ``folder`` if it is not there and another worker has made it."""

    @abstractmethod
    def part_made(self, number: int) -> None:
        """Let the other workers have a part of the prepared samples that was made in ``folder``."""

    @abstractmethod
    def commit(self, manifest: Manifest) -> Manifest:
        """Commit the manifest and, before it, the files that it names.

        Returns:
            the manifest that is there now: of two jobs that begin at once, the other's perhaps.
        """

    @abstractmethod
    def forget(self) -> None:
        """Take back a cache that has no shard yet: its rows cannot be prepared, and must change."""

    @abstractmethod
    def has_shard(self, number: int) -> bool:
        """Whether shard ``number`` is committed, by whomever; looks there."""

    @abstractmethod
    def absent(self, numbers: Iterable[int]) -> list[int]:
        """Those of the shards that are not there, as far as this worker knows."""

    @abstractmethod
    def missing(self, schema: ShardSchema, plan: Plan, numbers: Iterable[int]) -> list[int]:
        """Those of the shards still to be made; the others are as planned.

        Raises:
            CacheError: a shard that is there is damaged, or holds other samples than planned.
        """

    @abstractmethod
    def room(self, shard_bytes: np.ndarray) -> int:
        """Bytes of the disk of ``folder`` that shards of these sizes take while they are made."""

    @abstractmethod
    def on_commit(self, schema: ShardSchema) -> Callable[[int], None] | None:
        """What has to be done with a shard once its file in ``folder`` is committed; None: nothing."""

    @abstractmethod
    def seal(self) -> Manifest:
        """The manifest, of state complete if no shard is missing. Called where :meth:`alone` is True."""

    @abstractmethod
    def require_all_files(self, manifest: Manifest) -> None:
        """Whether a cache of state complete still has every file.

        Raises:
            CacheError: one is missing.
        """

    @abstractmethod
    def close(self, complete: bool) -> None:
        """Remove what only the making of the cache needed."""
