"""speculators' trainer (0.9.0) from a cache: its drafts, batch sampler and packing, without vLLM and its files.

Matched: ``speculators/train/data.py`` (ArrowDataset; CollateFn takes the records) and ``train/dataloader.py``. The
state that the verifier's head takes is that of its last decoder layer *before* the final norm, which the trainer
applies: the cache has to have captured that layer. It is no layer of the draft unless ``draft_layers`` names it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.data import Dataset

from cache_format.batch import DFlashTargetBatch
from cache_format.errors import InputError
from cache_format.export.interface import last_layer
from cache_format.reading.feature_cache import FeatureCache


def use(cache: FeatureCache, draft_layers: Sequence[int] | None = None) -> None:
    """The trainer's loaders of this process read ``cache`` from now on, whatever ``--data-path`` says.

    Args:
        cache: with the target's last layer among its target_layer_ids.
        draft_layers: those that the draft is conditioned on; None: all others. (speculators' own option counts from 1.)

    Raises:
        InputError: a layer that the cache does not have.
    """
    from speculators.train import dataloader

    dataloader.ArrowDataset = partial(CacheDataset, seen_by_draft(cache, draft_layers))


def seen_by_draft(cache: FeatureCache, draft_layers: Sequence[int] | None = None) -> FeatureCache:
    """The cache with the draft's layers, and the target's last one at the end; see :func:`use`."""
    last, layers = last_layer(cache), cache.target_layer_ids
    if last not in layers:
        wanted = ",".join(map(str, [*layers, last]))
        raise InputError(f"{cache.where}: has no output of the target's last layer; extract --target-layers {wanted}")
    chosen = [layer for layer in layers if layer != last] if draft_layers is None else [*draft_layers]
    return cache.view(layers=[*chosen, last])


class CacheDataset(Dataset):
    """In place of ArrowDataset: the same part of the rows for each split. Pickles to spawned workers."""

    def __init__(self, cache: FeatureCache, max_len: int, train_ratio: float = 1.0, split: str = "train", **given: Any):
        """``cache``: as :func:`seen_by_draft` gives it; the rest as ArrowDataset takes it."""
        bound = int(len(cache) * train_ratio)
        self.rows = range(bound) if split == "train" else range(bound, len(cache))
        self.cache, self.max_len = cache, max_len
        self.hidden_states_dtype = given.get("hidden_states_dtype", torch.bfloat16)
        self.approx_lengths = [int(cache.index.num_tokens[row]) for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return record(self.cache, self.cache[self.rows[index]])


def record(cache: FeatureCache, sample: DFlashTargetBatch) -> dict[str, Any]:
    """A record of speculators': tensors ``[S]`` and ``[S, ...]``, and ``lengths [1]``."""
    states, ids, width = sample.hidden_states[0], sample.input_ids[0], cache.hidden_size
    return {
        "hidden_states": states[:, :-width],
        "input_ids": ids,
        "verifier_last_hidden_states": states[:, -width:],
        "loss_mask": sample.loss_mask[0],
        "lengths": torch.tensor([len(ids)]),
        "position_ids": torch.arange(len(ids)),
    }
