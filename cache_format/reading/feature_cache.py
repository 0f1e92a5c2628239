"""FeatureCache: open a cache and read samples and batches from it, without the target."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from cache_format.batch import DFlashTargetBatch
from cache_format.codecs import RawCodec
from cache_format.device import parse
from cache_format.errors import CacheError, InputError, StorageError
from cache_format.layout.embeddings import EMBEDDINGS_NAME, load_input_embeddings, load_output_embeddings
from cache_format.layout.index import INDEX_NAME, SHARDS_NAME, Index, read_index, read_shard_sizes, tables_from_shards
from cache_format.layout.manifest import Manifest
from cache_format.layout.shard_layout import finished_shards, sample_hasher, shard_name
from cache_format.layout.shard_reader import ShardFile
from cache_format.reading.collate import mark
from cache_format.reading.expect import check_expected
from cache_format.reading.gather import Gathered, Piece, batch_bytes, gather, widened
from cache_format.reading.loader import CacheLoader, LoaderOptions, default_rank
from cache_format.reading.open_shards import OpenShard, OpenShards
from cache_format.reading.open_url import open_url
from cache_format.reading.packing import with_documents
from cache_format.reading.read_ahead import Turn, reading_ahead
from cache_format.reading.view import STORED, View, view_of, viewed
from cache_format.storage.byte_source import ByteSource
from cache_format.storage.folder import Folder, LocalFolder, StoreFolder
from cache_format.storage.host_memory import host_memory
from cache_format.storage.store import is_url

SEEN = ("target_layer_ids", "dtype")
"""Fields of the manifest that a view changes."""


class FeatureCache(Dataset):
    """A cache opened for reading: a sequence of samples and a map-style ``torch.utils.data.Dataset``.

    Sample i is the i-th stored sample in dataset order. Pickles as its path and options, so DataLoader workers
    (fork and spawn) open it anew. Threads may share it.
    """

    path: Path
    """the cache's folder; of a cache at a URL the local folder with its small files"""
    where: str
    """path or URL of the cache"""

    manifest: Manifest
    """what the cache is; of a :meth:`view` its ``target_layer_ids`` and ``dtype`` are those of the view"""
    index: Index
    """a row for each sample: see :class:`Index`"""

    def __init__(self, folder: Folder, manifest: Manifest, index: Index, shards: _Shards, options: dict[str, Any]):
        """Not called directly: use :meth:`open`."""
        self.folder, self.path, self.where = folder, folder.path, folder.where
        self.manifest = self._stored = manifest
        self.index = index
        self._schema = manifest.schema()
        self._shards = shards
        self._options = options
        self._opened = OpenShards(self._schema, may_vanish=isinstance(folder, StoreFolder))
        self._view = STORED

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        allow_incomplete: bool = False,
        expect: Mapping[str, Any] | None = None,
        verify: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        cache_limit: int | None = None,
    ) -> FeatureCache:
        """Open the cache in folder ``path``, or at a URL. Its cost does not grow with the number of samples.

        Of a cache at a URL the tables are fetched and their checksums compared. Without ``cache_dir`` samples are read
        by range, those of a batch side by side; what they are read into is the caller's own memory.

        Args:
            path: the folder, or the URL such as ``s3://bucket/prefix``, that ``dflash-cache extract --out`` wrote.
            allow_incomplete: read what a cache holds whose extraction has not finished; its tables are then
                rebuilt from the finished shards, which takes time in proportion to their number.
            expect: what the trainer relies on: any of ``target`` (name as given at extraction), ``model_type``,
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
            MismatchError: the cache is not what ``expect`` says; names both sides of every difference.
            InputError: ``expect`` has a field that a cache does not have.
        """
        if verify not in (None, "sample"):
            raise InputError(f'verify={verify!r}: choose "sample" or None')
        options = {
            "allow_incomplete": allow_incomplete,
            "expect": dict(expect or {}),
            "verify": verify,
            "cache_dir": None if cache_dir is None else os.path.abspath(cache_dir),
            "cache_limit": cache_limit,
        }
        return cls._open(_folder(path, options, None), options)

    @classmethod
    def _open(cls, folder: Folder, options: dict[str, Any]) -> FeatureCache:
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
            finished = finished_shards(folder.names("shards"))
            _, index = tables_from_shards(folder, manifest.schema(), finished)
            shards = _Shards(manifest.totals.shards)
        return cls(folder, manifest, index, shards, options)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.where, self._options, str(self.path), self._view)

    def __len__(self) -> int:
        """Stored samples."""
        return len(self.index)

    def __repr__(self) -> str:
        m = self.manifest
        return (
            f"FeatureCache({self.where!r}: {len(self):,} samples, target {m.target.name!r}, "
            f"target_layer_ids {m.target_layer_ids}, {m.dtype}, codec {m.codec['name']})"
        )

    @property
    def target_layer_ids(self) -> list[int]:
        """Decoder layers whose outputs are stored, in the order of the feature dimension."""
        return list(self.manifest.target_layer_ids)

    @property
    def hidden_size(self) -> int:
        """H: features of one layer; hidden_states have ``len(target_layer_ids) * H``."""
        return self.manifest.hidden_size

    def view(self, *, layers: Iterable[int] | None = None, dtype: torch.dtype | str | None = None) -> FeatureCache:
        """This cache with only some of its layers, or in another dtype; shares what is open, copies nothing.

        Args:
            layers: ids of decoder layers, any of the cache's ``target_layer_ids`` in any order. The raw and fp8 codecs
                read and decode only these; of another codec, and of a cache at a URL, the others are read along.
            dtype: of hidden_states, last_hidden_states, logits_topk_values, embeddings and head: float32, bfloat16,
                float16 or float64. Values are those of ``tensor.to(dtype)``; float16 ends at 65,504, which a target's
                first tokens may exceed.

        Raises:
            InputError: a layer that the cache does not have, or no such dtype.
        """
        chosen = self.target_layer_ids if layers is None else layers
        return self._seen(view_of(self._stored, self.target_layer_ids, chosen, dtype or self.manifest.dtype))

    @property
    def seen(self) -> dict[str, Any]:
        """Of a :meth:`view`, those of ``SEEN`` that are not the stored ones, as JSON values."""
        ours, stored = vars(self.manifest), vars(self._stored)
        return {name: ours[name] for name in SEEN if ours[name] != stored[name]}

    def _seen(self, view: View) -> FeatureCache:
        # Not copy.copy: that would open the cache anew, as pickling does.
        seen = object.__new__(type(self))
        vars(seen).update(vars(self))
        seen._view, seen.manifest = view, viewed(self._stored, view)
        return seen

    def __getitem__(self, i: int) -> DFlashTargetBatch:
        """Sample i as a batch with B = 1, unpadded.

        With the raw codec ``hidden_states`` is a view of the memory-mapped file (copy-on-write: writing to it changes
        no file) and stays valid as long as the tensor lives; with another it is the caller's own memory.

        Raises:
            IndexError: outside 0..len-1 (negative i counts from the end).
            CacheError: the shard is damaged or missing.
        """
        shard, start, stop = self._locate(i)
        if not isinstance(self._schema.codec, RawCodec) or self._view != STORED:
            return mark(self.batch([i]), self.where)
        stored = {t.name: shard.rows(t.name, start, stop) for t in self._schema.token_tensors}
        if self._options["verify"]:
            bytes_ = [stored[t.name].reshape(-1).view(torch.uint8).numpy() for t in self._schema.token_tensors]
            self._check_piece(Piece(i, shard.file, start, stop - start, 0, 0), bytes_)
        sample = DFlashTargetBatch(
            hidden_states=stored["hidden_states"].unsqueeze(0),
            input_ids=stored["input_ids"].to(torch.int64).unsqueeze(0),
            attention_mask=stored["attention_mask"].to(torch.int64).unsqueeze(0),
            loss_mask=stored["loss_mask"].to(torch.int64).unsqueeze(0),
            **{t.name: widened(stored[t.name]).unsqueeze(0) for t in self._schema.captures},
        )
        return mark(sample, self.where)

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
        return source.gather(rows, allocate=host_memory).decoded()

    def batch_bytes(self, tokens: int, decode: bool) -> int:
        """Memory of a batch of ``tokens`` tokens, padding included; ``decode`` as for :meth:`gather`."""
        return batch_bytes(self._schema, tokens, decode, self._view)

    def gather(
        self,
        rows: Sequence[Sequence[int] | np.ndarray],
        *,
        allocate: Callable[[int], Tensor],
        max_length: int | None = None,
        pack_to: int | None = None,
        decode: bool = True,
    ) -> Gathered:
        """A batch of rows that each hold one sample or, with ``pack_to``, several; what ``batch`` and ``loader`` use.

        Args:
            rows: the sample indices of each row, from left to right.
            allocate: gives the batch's memory: uint8, of a size in bytes.
            max_length: take no more than the first ``max_length`` tokens of a sample.
            pack_to: S, the length of every row; None: the longest row's.
            decode: False: states stay encoded where the codec has each token on its own, to be decoded on a device.

        Raises:
            IndexError, CacheError: as for ``cache[i]``.
        """
        pieces: list[Piece] = []
        readers = self.folder.readers
        if readers is not None:
            # Opening a shard takes the store's answer; all at once.
            list(readers.map(self._locate, {int(self.index.shard[i]): i for row in rows for i in row}.values()))
        check = self._check_piece if self._options["verify"] else None
        lengths = [[self._take(i, max_length) for i in row] for row in rows]
        for number, (row, sizes) in enumerate(zip(rows, lengths, strict=True)):
            at = 0
            for i, size in zip(row, sizes, strict=True):
                shard, start, _ = self._locate(i)
                pieces.append(Piece(int(i), shard.file, start, size, number, at, check))
                at += size
        longest = pack_to or max(sum(sizes) for sizes in lengths)
        gathered = gather(self._schema, pieces, len(rows), longest, allocate, decode, readers, self._view)
        return gathered if pack_to is None else replace(gathered, batch=with_documents(gathered.batch, lengths))

    def __getitems__(self, indices: Sequence[int]) -> list[DFlashTargetBatch]:
        """What a torch ``DataLoader`` asks for; give it ``collate_fn=cache_format.collate``."""
        return [self[i] for i in indices]

    def loader(
        self,
        batch_size: int | None = None,
        *,
        batch_tokens: int | None = None,
        pack_to: int | None = None,
        shuffle: bool | str = False,
        window_shards: int = 8,
        seed: int = 0,
        drop_last: bool = False,
        max_length: int | None = None,
        filter: Callable[[Index], np.ndarray] | None = None,
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

        ``len()``, ``set_epoch(epoch)``, ``state_dict()`` and ``load_state_dict(state)`` are what trainers expect of it;
        a state resumes within an epoch, exactly, on any number of ranks. The order is a pure function of the options,
        the seed and the epoch; threads and prefetch do not change it.

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
            filter: index columns -> bool for each sample, such as ``lambda index: index.num_loss_tokens >= 16``;
                columns are numpy arrays (``sample_id``, ``shard``, ``num_tokens``, ``num_loss_tokens``).
            rank: of this process; with ``world_size`` from torch.distributed or torchrun's environment by default.
                With tensor or context parallelism give both: the data-parallel rank, and how many of them there are.
            world_size: processes that share the epoch.
            device: where batches are wanted; copies to a CUDA device overlap with the trainer's work.
            threads: that read.
            prefetch: batches that are read ahead.
            decode_on_host: decode the fp8 codec on the host, not on the CUDA device; twice the bytes cross the bus, and
                the device computes nothing. zbits is always decoded on the host, by the reading threads.
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
            filter=filter,
            rank=its_rank if rank is None else rank,
            world_size=its_world if world_size is None else world_size,
            device=None if device is None else _device(device),
            threads=threads,
            prefetch=prefetch,
            decode_on_host=decode_on_host,
        )
        source = self if layers is None and dtype is None else self.view(layers=layers, dtype=dtype)
        return CacheLoader(source, options)

    def get_input_embeddings(self) -> nn.Embedding:
        """The target's token embedding, frozen, read from the cache itself; of a :meth:`view` in its dtype.

        Raises:
            CacheError: the file is missing or damaged; its checksum is compared.
        """
        self._check_embeddings()
        return load_input_embeddings(self.path, self.manifest.target).to(self._view.dtype)

    def get_output_embeddings(self) -> nn.Linear:
        """The target's LM head, frozen, read from the cache itself; of a :meth:`view` in its dtype.

        Raises:
            CacheError: the target has none; the file is missing or damaged (its checksum is compared).
        """
        self._check_embeddings()
        return load_output_embeddings(self.path, self.manifest.target).to(self._view.dtype)

    def _check_embeddings(self) -> None:
        self.folder.checked(EMBEDDINGS_NAME, self.manifest.files.get(EMBEDDINGS_NAME))

    def _take(self, i: int, max_length: int | None) -> int:
        """Tokens taken of sample i."""
        length = int(self.index.num_tokens[i])
        return length if max_length is None else min(length, max_length)

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

    def _locate(self, i: int) -> tuple[OpenShard, int, int]:
        if not -len(self) <= i < len(self):
            raise IndexError(f"sample {i} is outside 0..{len(self) - 1}")
        index = self.index
        number, start, length = int(index.shard[i]), int(index.row_start[i]), int(index.num_tokens[i])
        if not 0 <= number < self._shards.count:
            raise CacheError(f"{self.where}/{INDEX_NAME}", f"sample {i}: shard {number} does not exist")
        shard = self._opened.get(number, self._source)
        if length < 1 or start < 0 or start + length > shard.file.num_tokens:
            raise CacheError(f"{self.where}/{INDEX_NAME}", f"sample {i}: its rows are outside of shard {number}")
        return shard, start, start + length

    def _source(self, number: int) -> ByteSource:
        def check(path: Path) -> None:
            with ShardFile(path, self._schema, number) as shard:
                for position, checksum in enumerate(shard.sample_checksums.tolist()):
                    if shard.computed_checksum(position) != checksum:
                        name = f"{self.where}/{shard_name(number)}"
                        raise CacheError(name, f"sample {shard.sample_ids[position]} does not match its checksum")

        return self.folder.open(shard_name(number), self._shards.size(number), check)

    def read_ahead(self, number: int) -> None:
        """Have shard ``number`` in ``cache_dir``, to be read soon; an error shows when it is read."""
        with suppress(CacheError, StorageError):
            self._source(number).close()

    def fetching_ahead(self, turns: Iterator[Turn], window_shards: int) -> Iterator[Turn]:
        """A loader's ``turns``; with ``cache_dir`` the shards of later ones are downloaded meanwhile."""
        kept = self.folder.shards if isinstance(self.folder, StoreFolder) else None
        if kept is None or self._shards.bytes is None:
            return turns
        most = window_shards
        if kept.limit is not None:
            most = max(1, min(most, kept.limit // int(self._shards.bytes.max(initial=1)) - window_shards))
        return reading_ahead(turns, self.index.shard, self.read_ahead, most)


@dataclass(frozen=True)
class _Shards:
    """What the reader knows of the shards before it opens them."""

    count: int
    bytes: np.ndarray | None = None
    """of each; None where the tables are not there yet"""

    def size(self, number: int) -> int | None:
        return None if self.bytes is None else int(self.bytes[number])


def _folder(path: str | os.PathLike[str], options: dict[str, Any], small_files: Path | None) -> Folder:
    cache_dir = options["cache_dir"]
    if isinstance(path, str) and is_url(path):
        return open_url(path, None if cache_dir is None else Path(cache_dir), options["cache_limit"], small_files)
    if cache_dir is not None or options["cache_limit"] is not None:
        raise InputError("cache_dir= and cache_limit= are for a cache at a URL; this one is on the disk already")
    return LocalFolder(Path(os.path.abspath(path)))


def _device(name: torch.device | str) -> torch.device:
    try:
        return parse(name)
    except ValueError as error:
        raise InputError(f"loader: device {error}") from None


def _reopen(where: str, options: dict[str, Any], small_files: str, view: View) -> FeatureCache:
    return FeatureCache._open(_folder(where, options, Path(small_files)), options)._seen(view)


def _read_tables(folder: Folder, manifest: Manifest) -> tuple[Index, _Shards]:
    assert manifest.totals is not None
    if isinstance(folder, StoreFolder):
        for name in (SHARDS_NAME, INDEX_NAME):
            folder.checked(name, manifest.files.get(name))
    stored, sizes = read_shard_sizes(folder.local(SHARDS_NAME), manifest.fingerprint)
    index = read_index(folder.local(INDEX_NAME), manifest.fingerprint)
    samples = manifest.totals.samples - len(manifest.quarantined)
    if len(stored) != manifest.totals.shards or int(stored.sum()) != samples:
        raise CacheError(
            f"{folder.where}/{SHARDS_NAME}", f"does not list {manifest.totals.shards} shards of {samples:,} samples"
        )
    if len(index) != samples:
        raise CacheError(f"{folder.where}/{INDEX_NAME}", f"has {len(index):,} samples, the manifest {samples:,}")
    # A table's size of a local shard is not believed: the file says it.
    return index, _Shards(len(stored), sizes if isinstance(folder, StoreFolder) else None)
