"""Large host memory. Its first use costs more than what fills it later: the kernel gives and clears it page by page."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cache_format.device import has_streams, page_lock, pinned_memory

PAGE = 4096
"""Bytes of a page, of memory and of files."""


def host_memory(num_bytes: int, device: torch.device | None = None) -> Tensor:
    """uint8 ``[num_bytes]``, not cleared; page-locked if ``device`` has streams: copies between them are asynchronous.

    It comes from numpy, which asks Linux for pages of 2 MiB where torch takes those of 4 KiB: its first use takes half
    the time.
    """
    if device is None or not has_streams(device):
        return torch.from_numpy(np.empty(num_bytes, np.uint8))
    memory = _whole_pages(num_bytes)
    if page_lock(memory, device):
        return torch.from_numpy(memory)[:num_bytes]
    return pinned_memory(num_bytes)


def _whole_pages(num_bytes: int) -> np.ndarray:
    """At least as many bytes, on pages that nothing else lies on: a page is locked and unlocked whole."""
    size = max(1, -(-num_bytes // PAGE)) * PAGE
    memory = np.empty(size + PAGE, np.uint8)
    start = -memory.ctypes.data % PAGE
    return memory[start : start + size]
