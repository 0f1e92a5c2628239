"""Whether the codecs' inner loops can be compiled: by numba, where it is installed (``dflash-cache[fast]``).

Bytes and bits are those of numpy's and torch's passes beside them. A compiled loop does the whole of its work on a row
while that lies in a core's first cache, and without Python's lock, so that threads do not wait for each other.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import numpy as np
import torch


@cache
def compiled_loops() -> ModuleType | None:
    """``compiled_loops.py``; None without numba, where it does not go with the numpy that is installed, or where numpy
    adds in another order than that of version 1.26 to 2.4 on x86-64."""
    try:
        from cache_format.codecs import compiled_loops
    except ImportError:
        return None
    x = np.random.default_rng(0).standard_normal((8, 1003), np.float32)
    sums, squares = np.einsum("rh->r", x), np.einsum("rh,rh->r", x, x)
    is_same = all(
        compiled_loops.sum_as_numpy(row) == sums[i] and compiled_loops.squares_as_numpy(row) == squares[i]
        for i, row in enumerate(x)
    )
    return compiled_loops if is_same else None


def loops_for(dtype: torch.dtype) -> ModuleType | None:
    """The same for states of ``dtype``: there are loops for bfloat16 alone."""
    return compiled_loops() if dtype == torch.bfloat16 else None
