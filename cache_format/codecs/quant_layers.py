"""Layers whose states quant encodes and decodes: what it knows of them, in the shapes that its loops want."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from cache_format.codecs.quant_statistics import GROUPS, Statistics
from cache_format.codecs.thread_memory import thread_memory

AT_ONCE = 1 << 18
"""Features that are worked on at a time. Measured: with half as many the calls cost more than a larger cache saves."""

ONE_THREAD = 1 << 15
"""For so few features torch starts no threads."""


class QuantLayers:
    """Some of the statistics' layers; nothing of it changes but ``on_devices``, which is filled."""

    def __init__(self, statistics: Statistics, chosen: Sequence[int]):
        """``chosen``: which of the statistics' layers, in the order in which rows have them."""
        self.chosen = list(chosen)
        self.mean = statistics.means()[self.chosen]
        """float32 ``[L, H]``"""
        self.mean_tensor = torch.from_numpy(self.mean)
        num_layers, hidden_size = self.shape
        self.share = (np.array(statistics.step, np.float32) / np.float32(hidden_size))[self.chosen]
        """float32 ``[L]``: a token's step is this much of the sum of its features' sizes"""
        self.groups: list[list[slice]] = []
        """of each layer: where its groups stand once a row's features are sorted by layer and group"""
        order = []
        for number, group in enumerate(statistics.groups()[self.chosen]):
            first = number * hidden_size
            order.append(first + np.argsort(group, kind="stable"))
            ends = (first + np.cumsum(np.bincount(group, minlength=GROUPS))).tolist()
            self.groups.append([slice(low, high) for low, high in pairwise([first, *ends]) if low < high])
        self.all_groups = [group for of_layer in self.groups for group in of_layer]
        self.ends = np.array([group.stop for group in self.all_groups])
        sorted_, unsorted = np.concatenate(order), np.argsort(np.concatenate(order))
        self.is_sorted = bool((np.diff(sorted_) > 0).all())
        self.sorted, self.unsorted = torch.from_numpy(sorted_), torch.from_numpy(unsorted)
        """int64 ``[L*H]``: the feature of each place, and the place of each feature"""
        self.order, self.places = (
            (row % hidden_size).reshape(num_layers, hidden_size).astype(np.uint32) for row in (sorted_, unsorted)
        )
        """uint32 ``[L, H]``: the same, layer by layer"""
        self.on_devices: dict[torch.device, tuple[Tensor, Tensor]] = {}
        """the means and ``unsorted`` there"""

    @property
    def shape(self) -> tuple[int, int]:
        """Layers, and channels of each."""
        layers, hidden_size = self.mean.shape
        return layers, hidden_size


def scratch(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Two float32 arrays, of :func:`thread_memory`."""
    return thread_memory("quant's numbers", shape, np.float32), thread_memory("quant's rest", shape, np.float32)
