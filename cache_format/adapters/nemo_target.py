"""What NeMo's recipe gets instead of target and data: the tokens of a batch, then the batch of these tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cache_format.batch import DFlashTargetBatch
from cache_format.errors import InputError
from cache_format.reading.feature_cache import FeatureCache
from cache_format.reading.loader import CacheLoader

_TOKENS = ("input_ids", "attention_mask", "loss_mask", "position_ids", "seq_lens", "doc_remaining")


class CachedTarget:
    """In place of ``HFDFlashTargetModel``: what was read with the tokens that it is asked for."""

    def __init__(self, cache: FeatureCache, head: torch.nn.Module | None):
        """``head``: the target's, where its logits are wanted."""
        self.cache, self.target_layer_ids, self._head = cache, cache.target_layer_ids, head
        self._read: DFlashTargetBatch | None = None

    def tokens(self, loader: CacheLoader) -> Iterator[dict[str, Tensor]]:
        """The tokens of each batch; the batch waits for :meth:`generate_batch`."""
        for self._read in loader:
            given = ((name, getattr(self._read, name)) for name in _TOKENS)
            yield {name: tensor for name, tensor in given if tensor is not None}

    @torch.no_grad()
    def generate_batch(self, input_ids: Tensor, **_: Any) -> DFlashTargetBatch:
        """The batch of these tokens.

        Raises:
            InputError: they are not those that were read last.
        """
        batch = self._read
        if batch is None or not (input_ids is batch.input_ids or torch.equal(input_ids, batch.input_ids)):
            raise InputError("NeMo asks for other tokens than those of the batch that was read from the cache last")
        return batch if self._head is None else replace(batch, logits=self._head(batch.last_hidden_states))


class Tokens:
    """A dataloader of the recipe's; its ``sampler`` is the cache's loader."""

    def __init__(self, target: CachedTarget, loader: CacheLoader):
        self._target, self.sampler = target, loader

    def __len__(self) -> int:
        return self.sampler.steps_left

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self._target.tokens(self.sampler)
