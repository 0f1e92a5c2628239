"""One cache, opened: its tables, the shards held open, and each sample's place in them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cache_format.batch import DFlashTargetBatch
from cache_format.codecs import RawCodec
from cache_format.errors import CacheError, InputError, StorageError
from cache_format.layout.index import INDEX_NAME, SHARDS_NAME, Index, read_index, read_shard_facts, tables_from_shards
from cache_format.layout.manifest import Manifest
from cache_format.layout.samples import PreparedSamples, part_path
from cache_format.layout.shard_layout import finished_shards, sample_hasher, shard_name
from cache_format.layout.shard_reader import ShardFile
from cache_format.reading.batch_source import BatchSource
from cache_format.reading.collate import mark
from cache_format.reading.expect import check_expected
from cache_format.reading.gather import Piece, widened
from cache_format.reading.open_shards import OpenShard, OpenShards
from cache_format.reading.open_url import open_url
from cache_format.reading.view import STORED, View, seen
from cache_format.storage.byte_source import ByteSource
from cache_format.storage.folder import Folder, LocalFolder, StoreFolder
from cache_format.storage.host_memory import host_memory
from cache_format.storage.store import is_url


class OpenCache(BatchSource):
    """A cache in a folder or at a URL. Pickles as its place and options. Threads may share it."""

    def __init__(self, folder: Folder, manifest: Manifest, index: Index, shards: _Shards, options: Mapping[str, Any]):
        """See :func:`open_cache`."""
        self.folder, self.path, self.where = folder, folder.path, folder.where
        self.manifest = self.stored = manifest
        self.index, self.view, self.schema = index, STORED, manifest.schema()
        self.fingerprint = manifest.fingerprint
        self._shards, self._options = shards, options
        self.opened = OpenShards(self.schema, may_vanish=isinstance(folder, StoreFolder))

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.where, self._options, str(self.path), self.view)

    def viewed(self, view: View) -> OpenCache:
        """See :class:`BatchSource`; shares what is open."""
        # Not copy.copy: that would open the cache anew, as pickling does.
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        other.view, other.manifest = view, seen(self.stored, view)
        return other

    @property
    def parts(self) -> Sequence[BatchSource]:
        """See :class:`BatchSource`. Not kept: a cache ends with its last user, and its temporary files with it."""
        return (self,)

    @property
    def readers(self) -> Executor | None:
        """See :class:`BatchSource`."""
        return self.folder.readers

    def open_shards(self, samples: Sequence[int]) -> None:
        """See :class:`BatchSource`."""
        readers, one_of_each = self.folder.readers, {int(self.index.shard[i]): i for i in samples}
        # Opening a shard takes the store's answer; all at once.
        if readers is not None:
            list(readers.map(self.locate, one_of_each.values()))

    def piece(self, i: int, length: int, row: int, at: int) -> Piece:
        """See :class:`BatchSource`."""
        shard, start, _ = self.locate(i)
        return Piece(i, shard.file, start, length, row, at, self._check_piece if self._options["verify"] else None)

    def sample(self, i: int) -> DFlashTargetBatch:
        """See :class:`BatchSource`."""
        shard, start, stop = self.locate(i)
        if not isinstance(self.schema.codec, RawCodec) or self.view != STORED:
            return mark(self.gather([[i]], allocate=host_memory).decoded(), self.where)
        stored = {t.name: shard.rows(t.name, start, stop) for t in self.schema.token_tensors}
        if self._options["verify"]:
            bytes_ = [stored[t.name].reshape(-1).view(torch.uint8).numpy() for t in self.schema.token_tensors]
            self._check_piece(Piece(i, shard.file, start, stop - start, 0, 0), bytes_)
        sample = DFlashTargetBatch(
            hidden_states=stored["hidden_states"].unsqueeze(0),
            input_ids=stored["input_ids"].to(torch.int64).unsqueeze(0),
            attention_mask=stored["attention_mask"].to(torch.int64).unsqueeze(0),
            loss_mask=stored["loss_mask"].to(torch.int64).unsqueeze(0),
            **{t.name: widened(stored[t.name]).unsqueeze(0) for t in self.schema.captures},
        )
        return mark(sample, self.where)

    def learned(self, samples: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See :class:`BatchSource`."""
        return self._prepared.learned(self.index.sample_id[samples], lengths)

    def learned_counts(self) -> np.ndarray:
        """See :class:`BatchSource`."""
        return self._prepared.learned_counts(self.manifest.target.vocab_size)

    @cached_property
    def _prepared(self) -> PreparedSamples:
        assert self.manifest.totals is not None
        for number in range(self.manifest.totals.parts):
            self.folder.local(part_path(Path("samples"), number).as_posix())
        return PreparedSamples(self.folder.path / "samples", self.manifest.totals.parts)

    def most_ahead(self, window_shards: int) -> int | None:
        """See :class:`BatchSource`: with ``cache_dir``."""
        kept = self.folder.shards if isinstance(self.folder, StoreFolder) else None
        if kept is None or self._shards.bytes is None:
            return None
        if kept.limit is None:
            return window_shards
        return max(1, min(window_shards, kept.limit // int(self._shards.bytes.max(initial=1)) - window_shards))

    def read_ahead(self, shard: int) -> None:
        """See :class:`BatchSource`."""
        if self.most_ahead(1) is not None:
            with suppress(CacheError, StorageError):
                self._shard_source(shard).close()

    def locate(self, i: int) -> tuple[OpenShard, int, int]:
        if not -len(self) <= i < len(self):
            raise IndexError(f"sample {i} is outside 0..{len(self) - 1}")
        index = self.index
        number, start, length = int(index.shard[i]), int(index.row_start[i]), int(index.num_tokens[i])
        if not 0 <= number < self._shards.count:
            raise CacheError(f"{self.where}/{INDEX_NAME}", f"sample {i}: shard {number} does not exist")
        check = self._shards.require_head if self._options["verify"] else None
        shard = self.opened.get(number, self._shard_source, check)
        if length < 1 or start < 0 or start + length > shard.file.num_tokens:
            raise CacheError(f"{self.where}/{INDEX_NAME}", f"sample {i}: its rows are outside of shard {number}")
        return shard, start, start + length

    def _check_piece(self, piece: Piece, stored: Sequence[np.ndarray] | None) -> None:
        """Check a sample as it was read; one that was cut, or without some layers, is read again as a whole.

        Raises:
            CacheError: its checksum is not that of the index.
        """
        if stored is None or piece.length < int(self.index.num_tokens[piece.sample]):
            found = piece.shard.computed_checksum(piece.shard.position_at(piece.start))
        else:
            hasher = sample_hasher(int(self.index.sample_id[piece.sample]))
            for data in stored:
                hasher.update(data.data)
            found = hasher.intdigest()
        if found != int(self.index.checksum[piece.sample]):
            sample_id, number = int(self.index.sample_id[piece.sample]), int(self.index.shard[piece.sample])
            raise CacheError(
                f"{self.where}/{shard_name(number)}",
                f"sample {sample_id} does not match its checksum; to mend it run `dflash-cache repair {self.where}`, "
                "then the cache's extract command",
            )

    def _shard_source(self, number: int) -> ByteSource:
        def check(path: Path) -> None:
            with ShardFile(path, self.schema, number) as shard:
                self._shards.require_head(shard)
                for position, checksum in enumerate(shard.sample_checksums.tolist()):
                    if shard.computed_checksum(position) != checksum:
                        name = f"{self.where}/{shard_name(number)}"
                        raise CacheError(name, f"sample {shard.sample_ids[position]} does not match its checksum")

        return self.folder.open(shard_name(number), self._shards.size(number), check)


def open_cache(place: str | os.PathLike[str], options: Mapping[str, Any], small_files: Path | None = None) -> OpenCache:
    """Open a cache; ``options`` are those of ``FeatureCache.open``, by name.

    Args:
        place: a folder or a URL.
        options: ``allow_incomplete``, ``expect``, ``verify``, ``cache_dir``, ``cache_limit``.
        small_files: of a cache at a URL, a folder that has its small files already.

    Raises:
        CacheError, MismatchError, InputError: as ``FeatureCache.open``.
    """
    folder = _folder(place, options, small_files)
    manifest = Manifest.read(folder.path)
    if options["expect"]:
        check_expected(folder.where, manifest, options["expect"])
    if manifest.state == "complete":
        index, shards = _read_tables(folder, manifest)
    elif not options["allow_incomplete"]:
        raise CacheError(
            folder.where,
            f"is not complete (state {manifest.state}); run its `dflash-cache extract` command again to finish "
            "it, or open it with allow_incomplete=True to read the finished shards",
        )
    elif manifest.totals is None:
        raise CacheError(folder.where, "holds no shards yet: its samples are still being prepared")
    else:
        return _of_shards(folder, manifest, finished_shards(folder.names("shards")), options)
    return OpenCache(folder, manifest, index, shards, options)


def open_some(path: Path, manifest: Manifest, numbers: Iterable[int], options: Mapping[str, Any]) -> OpenCache:
    """Only shards ``numbers`` of the cache in a folder, finished or not; reads their heads and loss masks.

    Raises:
        CacheError: one is missing or damaged.
    """
    return _of_shards(LocalFolder(path), manifest, numbers, options)


def _of_shards(folder: Folder, manifest: Manifest, numbers: Iterable[int], options: Mapping[str, Any]) -> OpenCache:
    assert manifest.totals is not None
    _, index = tables_from_shards(folder, manifest.schema(), numbers)
    return OpenCache(folder, manifest, index, _Shards(manifest.totals.shards), options)


@dataclass(frozen=True)
class _Shards:
    """What the reader knows of the shards before it opens them."""

    count: int
    bytes: np.ndarray | None = None
    """of each; None where the tables are not there yet"""
    checksums: np.ndarray | None = None
    """the same: of each one's head"""

    def size(self, number: int) -> int | None:
        return None if self.bytes is None else int(self.bytes[number])

    def require_head(self, shard: ShardFile) -> None:
        """Whether what steers the decoding of a shard's samples is what was written; their checksums do not cover it.

        Raises:
            CacheError: it is not.
        """
        if self.checksums is not None and shard.head_checksum() != int(self.checksums[shard.number]):
            problem = f"its head does not match its checksum in {SHARDS_NAME}; to mend it run `dflash-cache repair`"
            raise CacheError(shard.where, f"{problem}, then the cache's extract command")


def _folder(path: str | os.PathLike[str], options: Mapping[str, Any], small_files: Path | None) -> Folder:
    cache_dir = options["cache_dir"]
    if isinstance(path, str) and is_url(path):
        return open_url(path, None if cache_dir is None else Path(cache_dir), options["cache_limit"], small_files)
    if cache_dir is not None or options["cache_limit"] is not None:
        raise InputError("cache_dir= and cache_limit= are for a cache at a URL; this one is on the disk already")
    return LocalFolder(Path(os.path.abspath(path)))


def _reopen(where: str, options: Mapping[str, Any], small_files: str, view: View) -> OpenCache:
    return open_cache(where, options, Path(small_files)).viewed(view)


def _read_tables(folder: Folder, manifest: Manifest) -> tuple[Index, _Shards]:
    assert manifest.totals is not None
    if isinstance(folder, StoreFolder):
        for name in (SHARDS_NAME, INDEX_NAME):
            folder.checked(name, manifest.files.get(name))
    stored, sizes, checksums = read_shard_facts(folder.local(SHARDS_NAME), manifest.fingerprint)
    index = read_index(folder.local(INDEX_NAME), manifest.fingerprint)
    samples = manifest.totals.samples - len(manifest.quarantined)
    if len(stored) != manifest.totals.shards or int(stored.sum()) != samples:
        raise CacheError(
            f"{folder.where}/{SHARDS_NAME}", f"does not list {manifest.totals.shards} shards of {samples:,} samples"
        )
    if len(index) != samples:
        raise CacheError(f"{folder.where}/{INDEX_NAME}", f"has {len(index):,} samples, the manifest {samples:,}")
    # A table's size of a local shard is not believed: the file says it.
    return index, _Shards(len(stored), sizes if isinstance(folder, StoreFolder) else None, checksums)
