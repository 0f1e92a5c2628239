"""Some rows of a sample as a :class:`BlockCodec` encodes them, before the places are known where they go."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class EncodedPart(ABC):
    """The blocks of a part of a sample, in one group, or in one for each layer.

    A sample is the sizes of its blocks, then the blocks; both group by group, and in a group part by part.
    """

    sizes: np.ndarray
    """uint32 ``[groups, blocks]``, as the sample says them"""
    num_bytes: Sequence[int]
    """of each group's blocks"""

    @abstractmethod
    def write(self, group: int, out: np.ndarray) -> None:
        """Write the blocks of ``group`` into ``out``, uint8 ``[num_bytes[group]]``."""


def write_all(out: np.ndarray, pieces: Iterable[np.ndarray]) -> int:
    """Write contiguous arrays into ``out`` (uint8), one after the other; returns where they end."""
    at = 0
    for piece in pieces:
        raw = piece.reshape(-1).view(np.uint8)
        # Not numpy's copy: it lets go of Python's lock, and waits for it.
        out[at : at + len(raw)].data[:] = raw.data
        at += len(raw)
    return at
