"""Batch memory that is used again. Fresh memory costs a page fault every 4 KiB, more than the read that fills it."""

from __future__ import annotations

import weakref
from collections import deque

import numpy as np
import torch
from torch import Tensor

from cache_format.storage.host_memory import host_memory


class BufferPool:
    """Buffers of one size, lent out as tensors; a buffer comes back by itself when its last tensor is dropped.

    So a batch stays valid for as long as anybody holds any tensor of it, views included.
    """

    def __init__(self, capacity: int, keep: int, device: torch.device | None = None):
        """
        Args:
            capacity: bytes of a buffer; memory is taken from the system as it is touched.
            keep: how many unused buffers are kept for the next lease.
            device: that copies go to; from page-locked memory if it has streams.
        """
        self.capacity, self.device = capacity, device
        # A full deque drops a buffer, which frees it. Its append and pop are atomic, from any thread.
        self._free: deque[np.ndarray] = deque(maxlen=keep)

    def lease(self, num_bytes: int) -> Tensor:
        """uint8 ``[num_bytes]``, not cleared; beyond ``capacity`` it is fresh memory that does not come back."""
        if num_bytes > self.capacity:
            return host_memory(num_bytes, self.device)
        try:
            memory = self._free.pop()
        except IndexError:
            memory = host_memory(self.capacity, self.device).numpy()
        # The tensor's storage holds this array, all its views share the storage: the array dies with the last of them.
        lent = memory[:num_bytes]
        weakref.finalize(lent, self._free.append, memory).atexit = False
        return torch.from_numpy(lent)
