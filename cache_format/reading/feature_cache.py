"""FeatureCache: open a cache and read samples and batches from it, without the target."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from cache_format.batch import DFlashTargetBatch
from cache_format.device import parse
from cache_format.errors import InputError
from cache_format.layout.collection import collection_at
from cache_format.layout.embeddings import (
    EMBEDDINGS_NAME,
    load_final_norm,
    load_input_embeddings,
    load_output_embeddings,
)
from cache_format.layout.index import Index
from cache_format.layout.manifest import Manifest
from cache_format.reading.batch_source import BatchSource
from cache_format.reading.cache_html import cache_html
from cache_format.reading.follow import FollowedCache
from cache_format.reading.joined_caches import JoinedCaches
from cache_format.reading.loader import CacheLoader, LoaderOptions, default_rank
from cache_format.reading.open_cache import OpenCache, open_cache
from cache_format.reading.view import view_of
from cache_format.storage.folder import Folder
from cache_format.storage.host_memory import host_memory
from cache_format.storage.store import is_url

Place = str | os.PathLike[str]

SEEN = ("target_layer_ids", "dtype")
"""Fields of the manifest that a view changes."""


class FeatureCache(Dataset):
    """A cache opened for reading: a sequence of samples and a map-style ``torch.utils.data.Dataset``.

    Sample i is the i-th stored sample in dataset order. Pickles as its path and options, so DataLoader workers
    (fork and spawn) open it anew. Threads may share it.
    """

    def __init__(self, *_: Any, **__: Any):
        """Not for use.

        Raises:
            InputError: always; says to use :meth:`open`.
        """
        raise InputError("a FeatureCache is not constructed but opened: FeatureCache.open(path)")

    @overload
    @classmethod
    def open(
        cls,
        path: Place | Sequence[Place],
        *,
        follow: Literal[False] = False,
        weights: Sequence[float] | None = None,
        allow_incomplete: bool = False,
        expect: Mapping[str, Any] | None = None,
        verify: Literal["sample"] | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        cache_limit: int | None = None,
    ) -> FeatureCache: ...

    @overload
    @classmethod
    def open(
        cls,
        path: Place,
        *,
        follow: Literal[True],
        keep_shards: int = 0,
        patience: float = 60.0,
        expect: Mapping[str, Any] | None = None,
        verify: Literal["sample"] | None = None,
    ) -> FollowedCache[FeatureCache]: ...

    @classmethod
    def open(
        cls,
        path: Place | Sequence[Place],
        *,
        follow: bool = False,
        keep_shards: int = 0,
        patience: float = 60.0,
        weights: Sequence[float] | None = None,
        allow_incomplete: bool = False,
        expect: Mapping[str, Any] | None = None,
        verify: Literal["sample"] | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        cache_limit: int | None = None,
    ) -> FeatureCache | FollowedCache[FeatureCache]:
        """Open the cache in folder ``path``, or at a URL; or several as one.

        The cost of one does not grow with the number of its samples; several take 36 bytes of memory a sample.

        Of a cache at a URL the tables are fetched and their checksums compared. Without ``cache_dir`` samples are read
        by range, those of a batch side by side; what they are read into is the caller's own memory.

        Args:
            path: the folder, or the URL such as ``s3://bucket/prefix``, that ``dflash-cache extract --out`` wrote. Or
                the folder or name of a collection.json (``cache_format.layout.collection``): all its caches. Or a list
                of these: one cache with the samples of all, one after the other.
            follow: read it while it is extracted: gives a :class:`~cache_format.FollowedCache`, an iterable over its
                shards as they are committed. For a folder.
            keep_shards: with ``follow`` and ``extract --keep``: shards that stay after they were read, so that a
                checkpoint from before them is gone on with at once (others are extracted again).
            patience: with ``follow``: seconds to wait for a shard while nobody writes the cache.
            weights: for a list: how often a sample of each comes in an epoch of a loader, such as ``[1, 0.25, 3]``.
                Of 0.25 it is another quarter each epoch. Default: every sample once.
            allow_incomplete: read what a cache holds whose extraction has not finished; its tables are then
                rebuilt from the finished shards, which takes time in proportion to their number.
            expect: what the trainer relies on: any of ``target`` (its name as given at extraction, another spelling of
                the same folder, or a cache of the same target, which is compared by the digests of config and
                weights), ``target.weights`` and other fields of the identity that begin so, ``model_type``,
                ``target_layer_ids``, ``hidden_size``, ``num_hidden_layers``, ``vocab_size``, ``dtype``,
                ``codec`` (its name), ``fingerprint``.
            verify: ``"sample"`` checks the checksum of each sample as it is read, all its stored bytes; the cost is
                one pass of XXH3 over them: 0.1 s of a core for each GB, 30 % more processor time than ``batch``
                takes to read them from the page cache (measured on x86_64). None: only headers are checked.
            cache_dir: for a URL: download whole shards into this local folder, each sample's checksum checked once,
                and read them there. The processes of a host may share it. Goes well with ``shuffle="window"``, whose
                coming shards are downloaded ahead.
            cache_limit: bytes of shards that ``cache_dir`` may hold; the least recently used are removed first. Give
                room for two windows (``2 * window_shards`` shards). None: no limit.

        Raises:
            CacheError: not a cache, damaged, or not complete.
            MismatchError: the cache is not what ``expect`` says, or two of a list differ in target, layers, dtype or
                captures; names both sides of every difference.
            InputError: ``expect`` has a field that a cache does not have.
        """
        if verify not in (None, "sample"):
            raise InputError(f'verify={verify!r}: choose "sample" or None')
        options = {
            "allow_incomplete": allow_incomplete,
            "expect": {name: getattr(value, "manifest", value) for name, value in (expect or {}).items()},
            "verify": verify,
            "cache_dir": None if cache_dir is None else os.path.abspath(cache_dir),
            "cache_limit": cache_limit,
        }
        if follow:
            if not isinstance(path, str | os.PathLike) or is_url(path) or options["cache_dir"] or weights:
                raise InputError("follow=True is for one cache in a folder")
            return FollowedCache(
                Path(os.path.abspath(path)), options, cls._of, keep_shards=keep_shards, patience=patience
            )
        if keep_shards:
            raise InputError("keep_shards= goes with follow=True")
        if isinstance(path, str | os.PathLike):
            if weights is not None:
                raise InputError("weights= is for a list of caches")
            return cls._of(_opened(path, options))
        return cls._of(JoinedCaches([_opened(place, options) for place in path], weights))

    @classmethod
    def concat(cls, caches: Sequence[FeatureCache], *, weights: Sequence[float] | None = None) -> FeatureCache:
        """Several opened caches (or views of them) as one, as :meth:`open` makes of a list.

        Raises:
            MismatchError: two of them differ in target, layers, dtype or captures.
            InputError: none, or weights that cannot be.
        """
        return cls._of(JoinedCaches([cache._source for cache in caches], weights))

    @classmethod
    def _of(cls, source: BatchSource) -> FeatureCache:
        cache = object.__new__(cls)
        cache._source = source
        return cache

    _source: BatchSource

    def __reduce__(self) -> tuple[Any, ...]:
        return FeatureCache._of, (self._source,)

    @property
    def where(self) -> str:
        """Path or URL of the cache; of several, all of them."""
        return self._source.where

    @property
    def path(self) -> Path:
        """The cache's folder; of a cache at a URL the local folder with its small files; of several, the first's."""
        return _first(self._source).path

    @property
    def folder(self) -> Folder:
        """Its files by name; of several caches, the first's."""
        return _first(self._source).folder

    @property
    def manifest(self) -> Manifest:
        """What the cache is; of a :meth:`view` with its layers and dtype. Of several caches the first's: target, layers
        and dtype are those of all."""
        return self._source.manifest

    @property
    def index(self) -> Index:
        """A row for each sample."""
        return self._source.index

    @property
    def fingerprint(self) -> str:
        """Digest of all that decides what is read."""
        return self._source.fingerprint

    def __len__(self) -> int:
        """Stored samples."""
        return len(self._source)

    def __iter__(self) -> Iterator[DFlashTargetBatch]:
        """Each sample, as ``cache[i]``."""
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        m = self.manifest
        return (
            f"FeatureCache({self.where!r}: {len(self):,} samples, target {m.target.name!r}, "
            f"target_layer_ids {m.target_layer_ids}, {m.dtype}, codec {m.codec['name']})"
        )

    def _repr_html_(self) -> str:
        return cache_html(self.where, self.manifest, self.index, self.target_layer_ids)

    @property
    def target_layer_ids(self) -> list[int]:
        """Decoder layers whose outputs are read, in the order of the feature dimension."""
        return list(self.manifest.target_layer_ids)

    @property
    def hidden_size(self) -> int:
        """H: features of one layer; hidden_states have ``len(target_layer_ids) * H``."""
        return self.manifest.hidden_size

    def view(self, *, layers: Iterable[int] | None = None, dtype: torch.dtype | str | None = None) -> FeatureCache:
        """This cache with only some of its layers, or in another dtype; shares what is open, copies nothing.

        Args:
            layers: ids of decoder layers, any of the cache's ``target_layer_ids`` in any order. All codecs but
                zbits decode only these, and read only these where the cache is on a disk.
            dtype: of hidden_states, last_hidden_states, logits_topk_values, embeddings and head: float32, bfloat16,
                float16 or float64. Values are those of ``tensor.to(dtype)``; float16 ends at 65,504, which a target's
                first tokens may exceed.

        Raises:
            InputError: a layer that the cache does not have, or no such dtype.
        """
        chosen = self.target_layer_ids if layers is None else layers
        asked = view_of(self._source.stored, self.target_layer_ids, chosen, dtype or self.manifest.dtype)
        return FeatureCache._of(self._source.viewed(asked))

    @property
    def seen(self) -> dict[str, Any]:
        """Of a :meth:`view`, those of ``SEEN`` that are not the stored ones, as JSON values."""
        ours, stored = vars(self.manifest), vars(self._source.stored)
        return {name: ours[name] for name in SEEN if ours[name] != stored[name]}

    def __getitem__(self, i: int | slice) -> DFlashTargetBatch:
        """Sample i as a batch with B = 1, unpadded; of a slice, :meth:`batch` of those samples.

        With the raw codec ``hidden_states`` is a view of the memory-mapped file (copy-on-write: writing to it changes
        no file) and stays valid as long as the tensor lives; with another it is the caller's own memory.

        Raises:
            IndexError: outside 0..len-1 (negative i counts from the end).
            InputError: a slice without samples.
            CacheError: the shard is damaged or missing.
        """
        if isinstance(i, slice):
            return self.batch(range(len(self))[i])
        return self._source.sample(operator.index(i))

    def batch(
        self,
        indices: Sequence[int] | np.ndarray | Tensor,
        *,
        layers: Iterable[int] | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> DFlashTargetBatch:
        """Samples ``indices`` as one batch, right-padded with zeros to the longest; masks are 0 on padding.

        The batch is the caller's own memory. ``layers`` and ``dtype`` as for :meth:`view`.

        Raises:
            InputError: no indices, or as :meth:`view`.
            IndexError, CacheError: as for ``cache[i]``.
        """
        rows = [[operator.index(i)] for i in indices]
        if not rows:
            raise InputError("batch() needs at least one sample index")
        source = self if layers is None and dtype is None else self.view(layers=layers, dtype=dtype)
        return source._source.gather(rows, allocate=host_memory).decoded()

    def __getitems__(self, indices: Sequence[int]) -> list[DFlashTargetBatch]:
        """What a torch ``DataLoader`` asks for; give it ``collate_fn=cache_format.collate``."""
        return [self[i] for i in indices]

    def loader(
        self,
        batch_size: int | None = None,
        *,
        batch_tokens: int | None = None,
        pack_to: int | None = None,
        shuffle: bool | Literal["full", "window"] = False,
        window_shards: int = 8,
        seed: int = 0,
        drop_last: bool = False,
        max_length: int | None = None,
        trim: bool = False,
        filter: Callable[[Index], np.ndarray] | None = None,
        split: tuple[Literal["train", "validation"], float] | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        device: torch.device | str | None = None,
        threads: int = 4,
        prefetch: int = 4,
        decode_on_host: bool = False,
        layers: Iterable[int] | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> CacheLoader:
        """Batches for training: an iterable of :class:`DFlashTargetBatch`, one epoch each time it is iterated over.

        ``len()``, ``set_epoch(epoch)``, ``skip(steps)``, ``state_dict()`` and ``load_state_dict(state)`` are what
        trainers expect of it; a state resumes within an epoch, exactly, on any number of ranks. The order is a pure
        function of the options, the seed and the epoch; threads and prefetch do not change it.

        A batch stays valid for as long as any tensor of it is held; its memory is then used again. Memory is bounded
        by ``prefetch + 2`` batches of the largest size, and those that the caller holds. On CUDA that memory
        is page-locked, and two batches are on the device beside those that the caller holds.

        Args:
            batch_size: samples of a batch, or packed rows.
            batch_tokens: instead: tokens of a batch, padding included. Samples of like length, found among
                4,096 neighbours in the order, go together, so that padding is small (2 % on 50,000 log-normal lengths).
                Batches of those 4,096 come in random order, so length has no trend: its correlation from one batch to
                the next, and with the place in the epoch, is below 0.1.
            pack_to: rows of S tokens with several samples in each, and position_ids, seq_lens and doc_remaining.
            shuffle: True or ``"full"``: all samples in random order. ``"window"``: shards in random order, samples
                mixed within ``window_shards`` of them, for disks and networks that are slow at random reads.
            window_shards: shards that are read at a time with ``shuffle="window"``.
            seed: of the shuffle, at least 0.
            drop_last: leave out an incomplete last batch and an incomplete last step over the ranks. Otherwise every
                sample comes exactly once an epoch: what is left for the last step is divided evenly over the ranks,
                and if it is fewer samples than ranks it joins the batches of the step before. (Only a resume on more
                ranks than samples are left in its epoch has no step before; it says how many it leaves out.)
            max_length: cut samples to their first ``max_length`` tokens.
            trim: cut samples after their last learned token, which no loss depends on; those without one are left out.
            filter: index columns -> bool for each sample, such as ``lambda index: index.num_loss_tokens >= 16``;
                columns are numpy arrays (``sample_id``, ``shard``, ``num_tokens``, ``num_loss_tokens``), the last two
                of what ``max_length`` and ``trim`` leave of the sample.
            split: ``("train", 0.98)``: that share of the samples, chosen by a hash of ``sample_id`` alone;
                ``("validation", 0.02)``: the others, if the two shares add up to 1.
            rank: of this process; with ``world_size`` from torch.distributed or torchrun's environment by default.
                With tensor or context parallelism give both: the data-parallel rank, and how many of them there are.
            world_size: processes that share the epoch.
            device: where batches are wanted; copies to a CUDA device overlap with the trainer's work.
            threads: that read.
            prefetch: batches that are read ahead.
            decode_on_host: decode fp8 and quant on the host, not on the CUDA device; twice the bytes cross the bus, and
                the device computes nothing. zbits is always decoded on the host, by the reading threads, and so is what
                quant coded: its steps and symbols cross.
            layers: only these of the stored layers, in this order, as for :meth:`view`.
            dtype: of the states, as for :meth:`view`; cast by the reading threads, or on the CUDA device.

        Raises:
            InputError: an option that cannot be, or samples longer than ``batch_tokens`` or ``pack_to``.
        """
        its_rank, its_world = default_rank()
        if rank is None and world_size is not None and its_world == 1 < world_size:
            raise InputError(f"loader: world_size={world_size} without rank=, and no torch.distributed that says it")
        options = LoaderOptions(
            batch_size=batch_size,
            batch_tokens=batch_tokens,
            pack_to=pack_to,
            shuffle=shuffle,
            window_shards=window_shards,
            seed=seed,
            drop_last=drop_last,
            max_length=max_length,
            trim=trim,
            filter=filter,
            split=split,
            rank=its_rank if rank is None else rank,
            world_size=its_world if world_size is None else world_size,
            device=None if device is None else _device(device),
            threads=threads,
            prefetch=prefetch,
            decode_on_host=decode_on_host,
        )
        source = self if layers is None and dtype is None else self.view(layers=layers, dtype=dtype)
        return CacheLoader(source._source, options)

    def learned_counts(self) -> np.ndarray:
        """int64 ``[V]``: how often each token is learned in the prepared samples; what a smaller draft vocabulary is
        chosen by (``cache_format.export.vocab_map``).

        Raises:
            CacheError: the prepared samples are missing or damaged.
        """
        return self._source.learned_counts()

    def get_input_embeddings(self) -> nn.Embedding:
        """The target's token embedding, frozen, read from the cache itself; of a :meth:`view` in its dtype.

        Raises:
            CacheError: the file is missing or damaged; its checksum is compared.
        """
        return load_input_embeddings(self._target_folder(), self.manifest.target).to(self._source.view.dtype)

    def get_output_embeddings(self) -> nn.Linear:
        """The target's LM head, frozen, read from the cache itself; of a :meth:`view` in its dtype.

        Raises:
            CacheError: the target has none; the file is missing or damaged (its checksum is compared).
        """
        return load_output_embeddings(self._target_folder(), self.manifest.target).to(self._source.view.dtype)

    def get_final_norm(self) -> torch.Tensor | None:
        """The ``w [H]`` of the target's last norm, ``w * x / RMS(x)``, that stands before its LM head: where a draft's
        own norm may begin. None where the target's is another, and in caches of earlier versions.

        Raises:
            CacheError: the file is missing or damaged (its checksum is compared).
        """
        return load_final_norm(self._target_folder(), self.manifest.target)

    def _target_folder(self) -> Path:
        first = _first(self._source)
        first.folder.checked(EMBEDDINGS_NAME, first.stored.files.get(EMBEDDINGS_NAME))
        return first.path


def only_cache(cache: FeatureCache) -> OpenCache:
    """The one cache that is read, as it is stored.

    Raises:
        InputError: there are several.
    """
    if len(cache._source.parts) != 1:
        raise InputError(f"{cache.where}: these are several caches; name one of them")
    return _first(cache._source)


def _opened(place: Place, options: Mapping[str, Any]) -> BatchSource:
    caches = collection_at(place)
    return open_cache(place, options) if caches is None else JoinedCaches([open_cache(c, options) for c in caches])


def _first(source: BatchSource) -> OpenCache:
    first = source.parts[0]
    assert isinstance(first, OpenCache)
    return first


def _device(name: torch.device | str) -> torch.device:
    try:
        return parse(name)
    except ValueError as error:
        raise InputError(f"loader: device {error}") from None
