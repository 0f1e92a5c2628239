"""Some rows of a sample as a :class:`BlockCodec` encodes them, before the place is known where they go."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class EncodedPart(ABC):
    """What a sample's bytes hold of a part of it: sizes at the sample's beginning, the rest behind those."""

    sizes: np.ndarray
    """uint32 ``[blocks]``"""
    num_bytes: int
    """of the rest"""

    @abstractmethod
    def write(self, out: np.ndarray) -> None:
        """Write the rest into ``out``, uint8 ``[num_bytes]``; once."""


def write_all(out: np.ndarray, pieces: Iterable[np.ndarray]) -> int:
    """Write contiguous arrays into ``out`` (uint8), one after the other; returns where they end."""
    at = 0
    for piece in pieces:
        raw = piece.reshape(-1).view(np.uint8)
        # Not numpy's copy: it lets go of Python's lock, and waits for it.
        out[at : at + len(raw)].data[:] = raw.data
        at += len(raw)
    return at
