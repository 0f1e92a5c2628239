"""What is asked of another project's offline cache, whatever its layout."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from torch import Tensor

from cache_format.codecs.dtypes import DTYPE_NAMES
from cache_format.errors import CacheError
from cache_format.layout.samples import Sample

STATE_DTYPES = ("F32", "BF16", "F16")
"""What states may be stored in, by safetensors' names."""

PRE_NORM, POST_NORM = "pre-norm", "post-norm"
"""The last decoder layer's own output, and the same after the target's final norm."""


@dataclass(frozen=True, slots=True)
class Record:
    """One sample as the peer has it, unpadded."""

    sample: Sample
    states: Tensor
    """``[S, L*H]``: the layers' states side by side, in the order of the layout"""
    last: Tensor | None
    """``[S, H]``: the last hidden states, where the layout holds them apart; see :attr:`PeerCache.last`"""


class PeerCache(ABC):
    """A folder of another project, opened; threads may share it. Samples are numbered 0 .. ``len`` - 1."""

    layer_ids: list[int] | None = None
    """decoder layers of the states, in order; None: the layout does not say"""
    last: str | None = None
    """``pre-norm`` or ``post-norm``: what the layout says of the states that it holds apart; None: it holds none"""

    def __init__(self, where: Path):
        self.where = where

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def digest(self) -> str:
        """Of names and sizes of all files, and of the content of those that say where samples lie."""

    @abstractmethod
    def tokens(self, i: int) -> Sample:
        """Sample ``i`` without its states.

        Raises:
            CacheError: damaged, or not of this layout.
        """

    @abstractmethod
    def record(self, i: int) -> Record:
        """Sample ``i``, all of it.

        Raises:
            CacheError: damaged, or not of this layout.
        """


def sample_of(where: Path | str, i: int, ids: np.ndarray, mask: np.ndarray) -> Sample:
    """Checked ids ``[S]`` and mask ``[S]`` of any whole numbers (or bool) as a sample of ours.

    Raises:
        CacheError: not one row of tokens with a mask of 0 and 1 beside it.
    """
    if ids.ndim != 1 or ids.shape != mask.shape or not len(ids):
        raise CacheError(where, f"sample {i}: ids of shape {ids.shape} and a loss mask of {mask.shape}, not one row")
    if not np.isin(mask, (0, 1)).all():
        raise CacheError(where, f"sample {i}: its loss mask has other values than 0 and 1; save weights as 0 and 1")
    if ids.dtype.kind not in "iu" or int(ids.min()) < 0 or int(ids.max()) >= 1 << 31:
        raise CacheError(where, f"sample {i}: its ids are not token ids")
    return Sample(ids.astype(np.int32), mask.astype(np.uint8), i)


def checked_record(where: Path | str, sample: Sample, states: Tensor, last: Tensor | None) -> Record:
    """The record, if states and tokens fit each other.

    Raises:
        CacheError: they do not, or the states are of a dtype that no cache stores.
    """
    i, rows = sample.source_row, len(sample.input_ids)
    for name, tensor in (("states", states), ("last hidden states", last)):
        if tensor is None:
            continue
        if tensor.ndim != 2 or len(tensor) != rows:
            raise CacheError(where, f"sample {i}: {rows} tokens, but its {name} are of shape {tuple(tensor.shape)}")
        if DTYPE_NAMES.get(tensor.dtype) not in STATE_DTYPES or tensor.dtype != states.dtype:
            raise CacheError(
                where, f"sample {i}: its {name} are {tensor.dtype}; only float32, bfloat16 or float16, all alike"
            )
    return Record(sample, states, last)


def digest_of_files(root: Path, paths: Iterable[Path], *content: bytes) -> str:
    """xxh3_128 (hex) over the names below ``root`` and sizes of ``paths``, and over ``content``.

    Raises:
        CacheError: one is missing.
    """
    hasher = xxhash.xxh3_128()
    for path in paths:
        try:
            size = path.stat().st_size
        except OSError as error:
            raise CacheError(path, f"cannot be read: {error.strerror}") from None
        hasher.update(f"{path.relative_to(root).as_posix()}\0{size}\n".encode())
    for data in content:
        hasher.update(data)
    return hasher.hexdigest()
