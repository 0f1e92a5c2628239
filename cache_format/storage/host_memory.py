"""Large host memory. Its first use costs more than what fills it later: the kernel gives and clears it page by page."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cache_format.device import pinned_memory

PAGE = 4096
"""Bytes of a page, of memory and of files."""


def host_memory(num_bytes: int, pin_memory: bool = False) -> Tensor:
    """uint8 ``[num_bytes]``, not cleared.

    ``pin_memory``: page-locked, from which copies to a device are asynchronous. Other memory comes from numpy,
    which asks Linux for pages of 2 MiB where torch takes those of 4 KiB: its first use takes half the time.
    """
    if pin_memory:
        return pinned_memory(num_bytes)
    return torch.from_numpy(np.empty(num_bytes, np.uint8))
