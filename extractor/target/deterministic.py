"""``--deterministic``: what torch needs to give the same bits every time on one machine with one software."""

from __future__ import annotations

import os

import torch


def be_deterministic() -> None:
    """Call it before the first CUDA kernel. An operation that has no deterministic kernel then raises an error.

    See https://pytorch.org/docs/stable/notes/randomness.html; cuBLAS reads the variable when it is first used.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)
    # On by default with it; for finding bugs, and it writes all memory once more.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
