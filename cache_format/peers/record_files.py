"""A file of torch.save for each sample, at any depth below the folder: SpecForge, Model Optimizer, AngelSlim.

Matched by their writers, versions as in export/: SpecForge ``scripts/prepare_hidden_states.py`` (states
``[1, S, L*H]``, ids ``[S]``; in files for EAGLE-3 they are ``aux_hidden_state`` and ``hidden_state``); Model Optimizer
``examples/speculative_decoding/collect_hidden_states``, as its OfflineSupervisedDataset describes them; AngelSlim
``tools/generate_dflash_data.py`` and ``generate_hidden_for_draft_model.py`` (``[1, S, ...]``, padding told by
``attention_mask``). Samples are in the order of their files' names, numbers in them as numbers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from cache_format.errors import CacheError, InputError
from cache_format.layout.samples import Sample
from cache_format.peers.interface import (
    POST_NORM,
    PRE_NORM,
    PeerCache,
    Record,
    checked_record,
    digest_of_files,
    sample_of,
)
from cache_format.peers.torch_file import TorchFile


@dataclass(frozen=True, kw_only=True)
class Fields:
    """What a project calls what a record holds."""

    ending: str
    """of the files' names"""
    states: Sequence[str]
    """``[S, L*H]``: the first of these that a file has"""
    last: Sequence[str]
    """``[S, H]``, after the final norm; the first of these that the first file has"""
    before_norm: str = ""
    """a flag: True where ``last`` is before the final norm"""


SPECFORGE = Fields(
    ending=".ckpt",
    states=("hidden_states", "aux_hidden_state"),
    last=("target_last_hidden_states", "hidden_state"),
)
MODELOPT = Fields(
    ending=".pt", states=("aux_hidden_states",), last=("hidden_states",), before_norm="hidden_states_prenorm"
)
ANGELSLIM = Fields(ending=".ckpt", states=("hidden_states",), last=("target_hiddens",))


class RecordFiles(PeerCache):
    """A folder of such files."""

    def __init__(self, where: Path, fields: Fields):
        """
        Raises:
            InputError: it has none.
            CacheError: the first of them is damaged, or another project's.
        """
        super().__init__(where)
        self._fields, self._paths = fields, _files(where, fields.ending)
        with TorchFile(self._paths[0]) as file:
            self._states = self._name(file, fields.states)
            self._last = next((name for name in fields.last if name in file.record), None)
            if self._last is not None:
                self.last = self._convention(file)

    def __len__(self) -> int:
        return len(self._paths)

    def digest(self) -> str:
        """See :class:`PeerCache`."""
        return digest_of_files(self.where, self._paths)

    def tokens(self, i: int) -> Sample:
        """See :class:`PeerCache`."""
        with TorchFile(self._paths[i]) as file:
            return self._sample(file, i)

    def record(self, i: int) -> Record:
        """See :class:`PeerCache`."""
        path = self._paths[i]
        with TorchFile(path) as file:
            sample = self._sample(file, i)
            states = self._row(file, self._states, path)
            last = None if self._last is None else self._row(file, self._last, path)
            if self._last is not None and self._convention(file) != self.last:
                raise CacheError(path, f"says that its {self._last} are {self._convention(file)}, others' {self.last}")
            if "attention_mask" in file.record:
                real = slice(len(sample.input_ids))
                states, last = states[real], None if last is None else last[real]
        return checked_record(path, sample, states, last)

    def _sample(self, file: TorchFile, i: int) -> Sample:
        path = self._paths[i]
        for name in ("input_ids", "loss_mask"):
            if name not in file.record:
                raise CacheError(path, f"has no {name}; without it nothing can be learned. Save it beside the states")
        ids, mask = (self._row(file, name, path).numpy() for name in ("input_ids", "loss_mask"))
        if "attention_mask" in file.record:
            real = self._row(file, "attention_mask", path).numpy().astype(bool)
            count = int(real.sum())
            if real.shape != ids.shape or not real[:count].all():
                raise CacheError(
                    path, "its attention_mask masks other tokens than the last ones; only padding is left out"
                )
            ids, mask = ids[:count], mask[:count]
        return sample_of(path, i, ids, mask)

    def _row(self, file: TorchFile, name: str, path: Path) -> Tensor:
        """Without a batch dimension of 1."""
        tensor = file.tensor(name)
        wanted = 1 if name in ("input_ids", "loss_mask", "attention_mask") else 2
        if tensor.ndim == wanted + 1 and len(tensor) == 1:
            tensor = tensor[0]
        if tensor.ndim != wanted:
            raise CacheError(path, f"its {name} are of shape {tuple(tensor.shape)}, not of one sample")
        return tensor

    def _convention(self, file: TorchFile) -> str:
        return PRE_NORM if file.record.get(self._fields.before_norm) else POST_NORM

    def _name(self, file: TorchFile, names: Sequence[str]) -> str:
        found = next((name for name in names if name in file.record), None)
        if found is None:
            raise CacheError(self._paths[0], f"has no {' or '.join(names)}; is --from the project that wrote it?")
        return found


def _files(where: Path, ending: str) -> list[Path]:
    found = []
    for folder, _, names in os.walk(where):
        for name in names:
            if name.endswith(f"{ending}.gz"):
                raise InputError(f"{where}: {name} is compressed; gunzip the files first (gunzip -r {where})")
            if name.endswith(ending) and not name.startswith("."):
                found.append(Path(folder, name))
    if not found:
        raise InputError(f"{where}: has no {ending} files; give the folder that the samples' files lie in or below")
    return sorted(found, key=partial(_natural, where))


def _natural(root: Path, path: Path) -> list[tuple[int, int, str]]:
    """``rows_0/data_10`` after ``rows_0/data_9``."""
    parts = re.split(r"(\d+)", os.path.relpath(path, root))
    return [(1, int(part), part) if part.isdigit() else (0, 0, part) for part in parts]


def open_specforge(where: Path) -> PeerCache:
    """See :class:`RecordFiles`."""
    return RecordFiles(where, SPECFORGE)


def open_modelopt(where: Path) -> PeerCache:
    """See :class:`RecordFiles`."""
    return RecordFiles(where, MODELOPT)


def open_angelslim(where: Path) -> PeerCache:
    """See :class:`RecordFiles`."""
    return RecordFiles(where, ANGELSLIM)
