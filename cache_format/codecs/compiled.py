"""Whether the codecs' inner loops can be compiled: by numba, where it is installed (``dflash-cache[fast]``).

Bytes and bits are those of numpy's and torch's passes beside them. A compiled loop does the whole of its work on a row
while that lies in a core's first cache, and without Python's lock, so that threads do not wait for each other.
"""

from __future__ import annotations

import os
import threading
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch

_locks: list[Any] = [threading.RLock()]
"""Held while numba is imported and first used (it imports more then); and then numba's own, held by who compiles."""


def _hold() -> None:
    for lock in _locks:
        lock.acquire()


def _let_go() -> None:
    for lock in reversed(_locks):
        lock.release()


# A child forked meanwhile would wait for ever for what a thread held that it does not have.
os.register_at_fork(before=_hold, after_in_parent=_let_go, after_in_child=_let_go)


@cache
def compiled_loops() -> ModuleType | None:
    """``compiled_loops.py``; None without numba, where it cannot be imported (it does not go with the numpy that is
    installed) or is told not to compile, or where numpy adds in another order than that of version 1.26 to 2.4 on
    x86-64."""
    with _locks[0]:
        try:
            from cache_format.codecs import compiled_loops
        except Exception:
            # Not an ImportError alone: numba meets other packages while it is imported.
            return None
        if compiled_loops.compiler_lock not in _locks:
            _locks.append(compiled_loops.compiler_lock)
        if not compiled_loops.is_compiling:
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
