"""Memory that a thread uses again from block to block: new pages cost time."""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np

_thread = threading.local()
_LEAST = 1 << 18
"""Elements that are taken at first, so that few blocks find it too small."""


def thread_memory(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Not cleared; the same as this thread was given under ``name`` before, unless that is too small.

    A name has one dtype.
    """
    count, found = math.prod(shape), getattr(_thread, name, None)
    if found is None or len(found) < count:
        found = np.empty(max(count, _LEAST), dtype)
        setattr(_thread, name, found)
    return found[:count].reshape(shape)
