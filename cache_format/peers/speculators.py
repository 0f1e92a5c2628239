"""speculators: a dataset saved by ``datasets`` and a safetensors file a sample, as export/speculators.py describes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from cache_format.codecs.dtypes import DTYPES
from cache_format.errors import CacheError, InputError
from cache_format.layout.safetensors_file import TensorPlace, read_container
from cache_format.layout.samples import Sample
from cache_format.peers.interface import PeerCache, Record, checked_record, digest_of_files, sample_of
from cache_format.storage.byte_source import LocalFile
from cache_format.storage.paths import inside


class SpeculatorsCache(PeerCache):
    """A folder of ``state.json``, ``data-*.arrow`` and ``hidden_states/hs_N.safetensors``."""

    def __init__(self, where: Path):
        """
        Raises:
            InputError: it is no dataset saved by ``datasets``, or a sample's file is missing.
            CacheError: it is damaged.
        """
        super().__init__(where)
        if not (where / "state.json").is_file():
            raise InputError(f"{where}: has no state.json; give speculators' --data-path, a dataset saved to disk")
        try:
            files = json.loads((where / "state.json").read_bytes()[: 1 << 20])["_data_files"]
            self._rows_files = [inside(where, str(file["filename"])) for file in files]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CacheError(where / "state.json", f"cannot be read: {error!r}") from None
        self._batches = [batch for path in self._rows_files for batch in _batches(path)]
        self._starts = np.concatenate([[0], np.cumsum([batch.num_rows for batch in self._batches])]).astype(np.int64)
        self._paths = [inside(where, f"hidden_states/hs_{i}.safetensors") for i in range(len(self))]
        missing = [path.name for path in self._paths if not path.exists()]
        if missing or not self._paths:
            raise InputError(
                f"{where}: {len(missing):,} of {len(self):,} samples have no states (hidden_states/"
                f"{missing[0] if missing else 'is empty'}); let speculators' generate_offline_data make them first"
            )

    def __len__(self) -> int:
        return int(self._starts[-1])

    def digest(self) -> str:
        """See :class:`PeerCache`."""
        return digest_of_files(self.where, [*self._rows_files, *self._paths])

    def tokens(self, i: int) -> Sample:
        """See :class:`PeerCache`."""
        part = int(np.searchsorted(self._starts, i, side="right")) - 1
        batch, row = self._batches[part], i - int(self._starts[part])
        ids, mask = (_row(batch, row, name, self.where) for name in ("input_ids", "loss_mask"))
        return sample_of(self.where, i, ids, mask)

    def record(self, i: int) -> Record:
        """See :class:`PeerCache`."""
        sample, path = self.tokens(i), self._paths[i]
        file = LocalFile(path)
        try:
            places = read_container(file).places
            if not {"token_ids", "hidden_states"} <= set(places):
                raise CacheError(path, "has no token_ids or no hidden_states; is it speculators'?")
            ids, states = (_read(file, places[name]) for name in ("token_ids", "hidden_states"))
        finally:
            file.close()
        if states.ndim != 3 or not np.array_equal(ids.numpy(), sample.input_ids):
            raise CacheError(path, f"is not of row {i}: its token_ids or the shape of its hidden_states are others")
        return checked_record(path, sample, states.flatten(1), None)


def _batches(path: Path) -> list[pa.RecordBatch]:
    if not path.is_file():
        raise CacheError(path, "is missing, which state.json names")
    try:
        with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
            batches = list(stream)
        for batch in batches:
            # Offsets of a damaged file would lead outside of it.
            batch.validate(full=True)
        return batches
    except (OSError, pa.ArrowException) as error:
        raise CacheError(path, f"cannot be read as rows of a dataset: {error}") from None


def _row(batch: pa.RecordBatch, row: int, name: str, where: Path) -> np.ndarray:
    try:
        values: Any = batch.column(name)[row].values
        numbers: np.ndarray = values.to_numpy(zero_copy_only=False)
    except (KeyError, AttributeError, pa.ArrowException, ValueError) as error:
        raise CacheError(where, f"its rows have no lists {name}: {error}; is --from right?") from None
    return numbers


def _read(file: LocalFile, place: TensorPlace) -> Tensor:
    data = np.empty(place.num_bytes, np.uint8)
    file.read_into(place.start, data)
    tensor = torch.from_numpy(data).view(DTYPES[place.dtype])
    return tensor.view(place.shape)
