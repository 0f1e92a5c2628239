"""FeatureCache: open a cache and read samples and batches from it, without the target."""

from __future__ import annotations

import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from cache_format.batch import DFlashTargetBatch
from cache_format.embeddings import load_input_embeddings, load_output_embeddings
from cache_format.errors import CacheError, InputError, MismatchError
from cache_format.index import INDEX_NAME, SHARDS_NAME, Index, read_index, read_shards, tables_from_shards
from cache_format.manifest import Manifest
from cache_format.safetensors_file import DTYPES
from cache_format.shard import ShardFile, sample_hasher, shard_name
from cache_format.storage import inside

MAX_OPEN_SHARDS = 128
"""Shards held open at once: well under the usual limit of 1,024 file descriptors."""

EXPECTABLE = (
    "target",
    "model_type",
    "target_layer_ids",
    "hidden_size",
    "num_hidden_layers",
    "vocab_size",
    "dtype",
    "codec",
    "fingerprint",
)
"""What ``FeatureCache.open(expect=...)`` can compare."""


class FeatureCache(Dataset):
    """A cache opened for reading: a sequence of samples and a map-style ``torch.utils.data.Dataset``.

    Sample i is the i-th stored sample in dataset order. Pickles as its path and options, so DataLoader workers
    (fork and spawn) open it anew. Threads may share it.
    """

    def __init__(self, path: Path, manifest: Manifest, index: Index, num_stored_shards: int, options: dict[str, Any]):
        """Not called directly: use :meth:`open`."""
        self.path = path
        self.manifest = manifest
        self.index = index
        self._schema = manifest.schema()
        self._num_shards = num_stored_shards
        self._options = options
        self._open_shards: OrderedDict[int, _MappedShard] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        allow_incomplete: bool = False,
        expect: Mapping[str, Any] | None = None,
        verify: str | None = None,
    ) -> FeatureCache:
        """Open the cache in folder ``path``. Its cost does not grow with the number of samples.

        Args:
            path: the folder that ``dflash-cache extract --out`` wrote.
            allow_incomplete: read what a cache holds whose extraction has not finished; its tables are then
                rebuilt from the finished shards, which takes time in proportion to their number.
            expect: what the trainer relies on: any of ``target`` (name as given at extraction), ``model_type``,
                ``target_layer_ids``, ``hidden_size``, ``num_hidden_layers``, ``vocab_size``, ``dtype``,
                ``codec`` (its name), ``fingerprint``.
            verify: ``"sample"`` checks the checksum of each sample as it is read, all its stored bytes; the cost is
                one pass of XXH3 over them (see scripts/bench_verify.py). None: only headers are checked.

        Raises:
            CacheError: not a cache, damaged, or not complete.
            MismatchError: the cache is not what ``expect`` says; names both sides of every difference.
            InputError: ``expect`` has a field that a cache does not have.
        """
        if verify not in (None, "sample"):
            raise InputError(f'verify={verify!r}: choose "sample" or None')
        folder = Path(os.path.abspath(path))
        manifest = Manifest.read(folder)
        if expect:
            _check_expected(folder, manifest, expect)
        options = {"allow_incomplete": allow_incomplete, "expect": dict(expect or {}), "verify": verify}
        if manifest.state == "complete":
            index, num_shards = _read_tables(folder, manifest)
        elif not allow_incomplete:
            raise CacheError(
                folder,
                f"is not complete (state {manifest.state}); run its `dflash-cache extract` command again to finish "
                "it, or open it with allow_incomplete=True to read the finished shards",
            )
        elif manifest.totals is None:
            raise CacheError(folder, "holds no shards yet: its samples are still being prepared")
        else:
            finished = [n for n in range(manifest.totals.shards) if (folder / shard_name(n)).exists()]
            _, index = tables_from_shards(folder, manifest.schema(), finished)
            num_shards = manifest.totals.shards
        return cls(folder, manifest, index, num_shards, options)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (str(self.path), self._options)

    def __len__(self) -> int:
        """Stored samples."""
        return len(self.index)

    def __repr__(self) -> str:
        m = self.manifest
        return (
            f"FeatureCache({str(self.path)!r}: {len(self):,} samples, target {m.target.name!r}, "
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

    def __getitem__(self, i: int) -> DFlashTargetBatch:
        """Sample i as a batch with B = 1, unpadded.

        ``hidden_states`` is a view of the memory-mapped file (copy-on-write: writing to it changes no file);
        it stays valid as long as the tensor lives.

        Raises:
            IndexError: outside 0..len-1 (negative i counts from the end).
            CacheError: the shard is damaged or missing.
        """
        shard, start, stop = self._locate(i)
        stored = {t.name: shard.view(t.name, start, stop) for t in self._schema.token_tensors}
        if self._options["verify"]:
            self._check_sample(i, [stored[t.name] for t in self._schema.token_tensors])
        return DFlashTargetBatch(
            hidden_states=self._schema.codec.decode(stored).unsqueeze(0),
            input_ids=stored["input_ids"].to(torch.int64).unsqueeze(0),
            attention_mask=stored["attention_mask"].to(torch.int64).unsqueeze(0),
            loss_mask=stored["loss_mask"].to(torch.int64).unsqueeze(0),
            **{t.name: _widened(stored[t.name]).unsqueeze(0) for t in self._schema.captures},
        )

    def batch(self, indices: Sequence[int] | np.ndarray) -> DFlashTargetBatch:
        """Samples ``indices`` as one batch, right-padded with zeros to the longest; masks are 0 on padding.

        The batch is the caller's own memory.

        Raises:
            InputError: no indices.
            IndexError, CacheError: as for ``cache[i]``.
        """
        if not len(indices):
            raise InputError("batch() needs at least one sample index")
        samples = [self[i] for i in indices]
        shape = (len(samples), max(sample.input_ids.shape[1] for sample in samples))
        hidden = torch.empty(*shape, self.manifest.width, dtype=self.manifest.torch_dtype)
        ids, attention, loss = (torch.zeros(shape, dtype=torch.int64) for _ in range(3))
        for row, sample in enumerate(samples):
            length = sample.input_ids.shape[1]
            hidden[row, :length] = sample.hidden_states[0]
            hidden[row, length:] = 0
            ids[row, :length] = sample.input_ids[0]
            attention[row, :length] = sample.attention_mask[0]
            loss[row, :length] = sample.loss_mask[0]
        extra = {t.name: pad_sequence([getattr(s, t.name)[0] for s in samples], True) for t in self._schema.captures}
        return DFlashTargetBatch(hidden, ids, attention, loss, **extra)

    def loader(
        self, batch_size: int, *, shuffle: bool = False, seed: int = 0, drop_last: bool = False
    ) -> Iterator[DFlashTargetBatch]:
        """One epoch of batches: every sample once, in order or in an order drawn from ``seed``."""
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; it must be at least 1")
        order = np.random.default_rng(seed).permutation(len(self)) if shuffle else np.arange(len(self))
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            if len(chosen) == batch_size or not drop_last:
                yield self.batch(chosen)

    def get_input_embeddings(self) -> nn.Embedding:
        """The target's token embedding, frozen, read from the cache itself."""
        return load_input_embeddings(self.path, self.manifest.target)

    def get_output_embeddings(self) -> nn.Linear:
        """The target's LM head, frozen, read from the cache itself."""
        return load_output_embeddings(self.path, self.manifest.target)

    def _check_sample(self, i: int, pieces: Sequence[Tensor]) -> None:
        """Compare sample i's checksum with that of its stored rows, tensor by tensor in file order.

        Raises:
            CacheError: they differ.
        """
        hasher = sample_hasher(int(self.index.sample_id[i]))
        for piece in pieces:
            hasher.update(piece.reshape(-1).view(torch.uint8).numpy().data)
        if hasher.intdigest() != int(self.index.checksum[i]):
            raise CacheError(
                self.path / shard_name(int(self.index.shard[i])),
                f"sample {self.index.sample_id[i]} does not match its checksum; to mend it run `dflash-cache repair "
                f"{self.path}`, then the cache's extract command",
            )

    def _locate(self, i: int) -> tuple[_MappedShard, int, int]:
        if not -len(self) <= i < len(self):
            raise IndexError(f"sample {i} is outside 0..{len(self) - 1}")
        index = self.index
        number, start, length = int(index.shard[i]), int(index.row_start[i]), int(index.num_tokens[i])
        if not 0 <= number < self._num_shards:
            raise CacheError(self.path / INDEX_NAME, f"sample {i}: shard {number} does not exist")
        shard = self._shard(number)
        if length < 1 or start < 0 or start + length > shard.file.num_tokens:
            raise CacheError(self.path / INDEX_NAME, f"sample {i}: its rows are outside of shard {number}")
        return shard, start, start + length

    def _shard(self, number: int) -> _MappedShard:
        with self._lock:
            shard = self._open_shards.pop(number, None) or _MappedShard(self.path, self._schema, number)
            self._open_shards[number] = shard
            while len(self._open_shards) > MAX_OPEN_SHARDS:
                self._open_shards.popitem(last=False)[1].file.close()
            return shard


class _MappedShard:
    """A checked shard file and its private memory map."""

    def __init__(self, cache: Path, schema: Any, number: int):
        self.file = ShardFile(inside(cache, shard_name(number)), schema, number)
        with open(self.file.path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        if len(self._map) != self.file.container.num_bytes:
            raise CacheError(self.file.path, "changed its size while it was opened")

    def view(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a per-token tensor, without a copy."""
        place = self.file.container.places[name]
        offset, _ = self.file.row_range(name, start, stop)
        count = (stop - start) * place.row_bytes // place.itemsize
        flat = torch.frombuffer(self._map, dtype=DTYPES[place.dtype], count=count, offset=offset)
        return flat.view(stop - start, *place.shape[1:])


def _widened(stored: Tensor) -> Tensor:
    """Token ids are int64 in a batch; everything else is as stored."""
    return stored.to(torch.int64) if stored.dtype == torch.int32 else stored


def _reopen(path: str, options: dict[str, Any]) -> FeatureCache:
    return FeatureCache.open(path, **options)


def _read_tables(folder: Path, manifest: Manifest) -> tuple[Index, int]:
    assert manifest.totals is not None
    shards = read_shards(inside(folder, SHARDS_NAME), manifest.fingerprint)
    index = read_index(inside(folder, INDEX_NAME), manifest.fingerprint)
    samples = manifest.totals.samples - len(manifest.quarantined)
    if len(shards) != manifest.totals.shards or sum(row.samples for row in shards) != samples:
        raise CacheError(folder / SHARDS_NAME, f"does not list {manifest.totals.shards} shards of {samples:,} samples")
    if len(index) != samples:
        raise CacheError(folder / INDEX_NAME, f"has {len(index):,} samples, the manifest {samples:,}")
    return index, len(shards)


def _check_expected(folder: Path, manifest: Manifest, expect: Mapping[str, Any]) -> None:
    unknown = sorted(set(expect) - set(EXPECTABLE))
    if unknown:
        raise InputError(f"expect: a cache has no field {', '.join(unknown)}; it has {', '.join(EXPECTABLE)}")
    target = manifest.target
    have = {
        "target": target.name,
        "model_type": target.model_type,
        "target_layer_ids": manifest.target_layer_ids,
        "hidden_size": target.hidden_size,
        "num_hidden_layers": target.num_hidden_layers,
        "vocab_size": target.vocab_size,
        "dtype": manifest.dtype,
        "codec": manifest.codec["name"],
        "fingerprint": manifest.fingerprint,
    }
    asked = {name: _plain(value) for name, value in expect.items()}
    different = {name: (have[name], asked[name]) for name in asked if have[name] != asked[name]}
    if different:
        raise MismatchError(f"{folder}: this cache is not what the trainer expects. Different:", different)


def _plain(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return list(value) if isinstance(value, tuple | range) else value
