"""DeepSpec: its target cache, protocol version 2. export/deepspec.py describes the folder.

Its writer takes each layer's own output by hooks, and the last hidden states after the final norm.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache_format.errors import CacheError, InputError
from cache_format.layout.samples import Sample
from cache_format.peers.interface import POST_NORM, PeerCache, Record, checked_record, digest_of_files, sample_of
from cache_format.storage.byte_source import LocalFile
from cache_format.storage.paths import inside

VERSION = 2
MAX_MANIFEST_BYTES = 64 << 20
_TENSORS = ("input_ids", "attention_mask", "loss_mask", "target_hidden_states", "target_last_hidden_states")
_RECORD = np.dtype(
    [("sample_id", "<u8"), ("shard_id", "<u4"), ("seq_len", "<u4"), *((name, "<u8") for name in _TENSORS)]
)
_SAYS = {"version": VERSION, "hidden_dtype": "bfloat16", "token_dtype": "int32", "mask_dtype": "uint8"}


class DeepSpecCache(PeerCache):
    """A folder of ``shard-*.bin``, ``samples.idx`` and ``manifest.json``."""

    last = POST_NORM

    def __init__(self, where: Path):
        """
        Raises:
            InputError: there is no manifest.json.
            CacheError: another version, or damaged.
        """
        super().__init__(where)
        if not (where / "manifest.json").exists():
            raise InputError(f"{where}: has no manifest.json; give the folder that DeepSpec's target cache lies in")
        self._told, self._index = self._content("manifest.json"), self._content("samples.idx")
        try:
            manifest = json.loads(self._told)
            self._require(manifest)
            self.layer_ids = [int(layer) for layer in manifest["target_layer_ids"]]
            self._hidden_size = int(manifest["hidden_size"])
            self._shards = [inside(where, str(shard["file_name"])) for shard in manifest["shards"]]
            self._records = np.frombuffer(self._index, _RECORD)
            if len(self._records) != manifest["num_samples"]:
                raise ValueError("samples.idx has another number of samples")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CacheError(where / "manifest.json", f"is not that of a target cache: {error}") from None
        if not len(self._records):
            raise InputError(f"{where}: has no samples; there is nothing to import")

    def __len__(self) -> int:
        return len(self._records)

    def digest(self) -> str:
        """See :class:`PeerCache`."""
        return digest_of_files(self.where, self._shards, self._told, self._index)

    def tokens(self, i: int) -> Sample:
        """See :class:`PeerCache`."""
        path, count = self._place(i)
        file = LocalFile(path)
        try:
            return self._sample(file, i, count)
        finally:
            file.close()

    def record(self, i: int) -> Record:
        """See :class:`PeerCache`."""
        path, count = self._place(i)
        assert self.layer_ids is not None
        file = LocalFile(path)
        try:
            sample = self._sample(file, i, count)
            states = self._states(file, i, count, "target_hidden_states", len(self.layer_ids) * self._hidden_size)
            last = self._states(file, i, count, "target_last_hidden_states", self._hidden_size)
        finally:
            file.close()
        return checked_record(path, sample, states, last)

    def _content(self, name: str) -> bytes:
        file = LocalFile(inside(self.where, name))
        try:
            if name.endswith(".json") and file.size > MAX_MANIFEST_BYTES:
                raise CacheError(file.where, f"is longer than {MAX_MANIFEST_BYTES >> 20} MiB; it is no manifest")
            data = np.empty(file.size, np.uint8)
            file.read_into(0, data)
            return data.tobytes()
        finally:
            file.close()

    def _require(self, manifest: Any) -> None:
        for name, value in _SAYS.items():
            if manifest[name] != value:
                raise ValueError(f"{name} is {manifest[name]!r}; only {value!r} is known")
        if not manifest["target_layer_ids"] or int(manifest["hidden_size"]) < 1:
            raise ValueError("it names no layers, or no hidden_size")

    def _place(self, i: int) -> tuple[Path, int]:
        shard = int(self._records["shard_id"][i])
        if shard >= len(self._shards):
            raise CacheError(self.where / "samples.idx", f"sample {i} is in shard {shard}, which manifest.json has not")
        return self._shards[shard], int(self._records["seq_len"][i])

    def _sample(self, file: LocalFile, i: int, count: int) -> Sample:
        ids, real, mask = (self._bytes(file, i, name, count * size) for name, size in zip(_TENSORS, (4, 1, 1)))  # noqa: B905
        if not real.all():
            raise CacheError(file.where, f"sample {i}: its attention_mask has zeros; only unpadded samples are known")
        return sample_of(file.where, i, ids.view("<i4"), mask)

    def _states(self, file: LocalFile, i: int, count: int, name: str, width: int) -> Tensor:
        data = self._bytes(file, i, name, count * width * 2)
        return torch.from_numpy(data).view(torch.bfloat16).view(count, width)

    def _bytes(self, file: LocalFile, i: int, name: str, size: int) -> np.ndarray:
        start = int(self._records[name][i])
        if start + size > file.size:
            raise CacheError(file.where, f"is cut: sample {i}'s {name} would end at byte {start + size:,}")
        data = np.empty(size, np.uint8)
        file.read_into(start, data)
        return data
