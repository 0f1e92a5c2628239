"""What batches are read from: one opened cache, or several as one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import replace

import numpy as np
from torch import Tensor

from cache_format.batch import DFlashTargetBatch
from cache_format.layout.index import Index
from cache_format.layout.manifest import Manifest
from cache_format.layout.shard_layout import ShardSchema
from cache_format.reading.gather import Gathered, Piece, batch_bytes, gather
from cache_format.reading.packing import with_documents
from cache_format.reading.read_ahead import Turn, reading_ahead
from cache_format.reading.view import View


class BatchSource(ABC):
    """Samples by number, and batches of them in memory that the caller gives."""

    where: str
    """path or URL"""
    manifest: Manifest
    """as it is seen through ``view``"""
    stored: Manifest
    index: Index
    """a row for each sample"""
    schema: ShardSchema
    """of the shards"""
    view: View
    weights: Sequence[float] | None = None
    """how often a sample of each part comes in an epoch; None: once"""
    fingerprint: str
    """of what is read"""

    def __len__(self) -> int:
        return len(self.index)

    @property
    @abstractmethod
    def parts(self) -> Sequence[BatchSource]:
        """The caches, one after the other."""

    @property
    @abstractmethod
    def readers(self) -> Executor | None:
        """Threads that read pieces side by side; None where they are read one after the other."""

    @abstractmethod
    def viewed(self, view: View) -> BatchSource:
        """The same, seen so."""

    @abstractmethod
    def sample(self, i: int) -> DFlashTargetBatch:
        """See ``FeatureCache.__getitem__``."""

    @abstractmethod
    def piece(self, i: int, length: int, row: int, at: int) -> Piece:
        """The first ``length`` tokens of sample i, for that place in a batch.

        Raises:
            IndexError, CacheError: as for ``cache[i]``.
        """

    @abstractmethod
    def open_shards(self, samples: Sequence[int]) -> None:
        """Open the shards that hold them: side by side, where they are far away."""

    @abstractmethod
    def most_ahead(self, window_shards: int) -> int | None:
        """How many shards may be fetched before their turn; None where whole shards are not fetched."""

    @abstractmethod
    def read_ahead(self, shard: int) -> None:
        """Have that shard on this disk, to be read soon, if it is to be; an error shows when it is read."""

    def fetching_ahead(self, turns: Iterator[Turn], window_shards: int) -> Iterator[Turn]:
        """A loader's ``turns``; meanwhile the shards of later ones are fetched, where whole shards are kept."""
        most = self.most_ahead(window_shards)
        return turns if most is None else reading_ahead(turns, self.index.shard, self.read_ahead, most)

    @abstractmethod
    def learned(self, samples: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of the first ``lengths`` tokens of each sample, int64 each: how many are learned, and up to where: 1 + the
        place of the last; 0 where none is. Read from the prepared samples, not from the shards.

        Raises:
            CacheError: these are missing or damaged.
        """

    @abstractmethod
    def learned_counts(self) -> np.ndarray:
        """int64 ``[V]``: how often each token of the vocabulary is learned, in all prepared samples.

        Raises:
            CacheError: these are missing or damaged.
        """

    @property
    def decodes_on_host(self) -> bool:
        """Whether states have to be decoded before they are together in one batch."""
        return False

    def batch_bytes(self, tokens: int, decode: bool) -> int:
        """Memory of a batch of ``tokens`` tokens, padding included; ``decode`` as for :meth:`gather`."""
        return batch_bytes(self.schema, tokens, decode or self.decodes_on_host, self.view)

    def gather(
        self,
        rows: Sequence[Sequence[int] | np.ndarray],
        *,
        allocate: Callable[[int], Tensor],
        lengths: np.ndarray | None = None,
        pack_to: int | None = None,
        decode: bool = True,
    ) -> Gathered:
        """A batch of rows that each hold one sample or, with ``pack_to``, several; what ``batch`` and ``loader`` use.

        Args:
            rows: the sample indices of each row, from left to right.
            allocate: gives the batch's memory: uint8, of a size in bytes.
            lengths: of every sample of the source, how many of its tokens are taken; None: all.
            pack_to: S, the length of every row; None: the longest row's.
            decode: False: states stay encoded where the codec has each token on its own, to be decoded on a device.

        Raises:
            IndexError, CacheError: as for ``cache[i]``.
        """
        readers = self.readers
        if readers is not None:
            self.open_shards([int(i) for row in rows for i in row])
        taken = self.index.num_tokens if lengths is None else lengths
        sizes = [[int(taken[i]) for i in row] for row in rows]
        pieces: list[Piece] = []
        for number, row in enumerate(rows):
            at = 0
            for i, size in zip(row, sizes[number], strict=True):
                pieces.append(self.piece(int(i), size, number, at))
                at += size
        longest = pack_to or max(sum(of_row) for of_row in sizes)
        decode = decode or self.decodes_on_host
        gathered = gather(self.schema, pieces, len(rows), longest, allocate, decode, readers, self.view)
        return gathered if pack_to is None else replace(gathered, batch=with_documents(gathered.batch, sizes))
