"""DFlashTargetBatch: what a DFlash trainer gets for one step, online from the target or offline from the cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from cache_format.repr_html import html_table


@dataclass(repr=False)
class DFlashTargetBatch:
    """One training batch: B samples, right-padded to S tokens; L captured layers of hidden size H, side by side.

    The first eight fields have the names and the order of NeMo AutoModel's class, so a trainer takes either.
    """

    hidden_states: Tensor
    """``[B, S, L*H]``, stored dtype: captured layers concatenated in the order of ``target_layer_ids``, not shifted"""
    input_ids: Tensor
    """``[B, S]`` int64"""
    attention_mask: Tensor
    """``[B, S]`` int64: 1 on real tokens, 0 on padding"""
    loss_mask: Tensor
    """``[B, S]`` int64: 1 where the draft is trained on the token"""
    logits: Tensor | None = None
    """``[B, S, V]``: the target's logits, where they were asked for (``capture_logits=True``)"""
    position_ids: Tensor | None = None
    """``[B, S]`` int64, packed rows only: position within the document, from 0"""
    seq_lens: Tensor | None = None
    """``[B, D]`` int64, packed rows only: lengths of each row's documents, the padding at its end counted as one more;
    then zeros, to the largest number of documents"""
    doc_remaining: Tensor | None = None
    """``[B, S]`` int64, packed rows only: tokens that follow in the same document, 0 at its last one and on padding"""
    last_hidden_states: Tensor | None = None
    """``[B, S, H]``, stored dtype: what the target's LM head takes, after the final norm"""
    logits_topk_values: Tensor | None = None
    """``[B, S, K]``, stored dtype: the target's largest logits, in descending order"""
    logits_topk_ids: Tensor | None = None
    """``[B, S, K]`` int64: their token ids"""
    logits_logsumexp: Tensor | None = None
    """``[B, S]`` float32: log-sum-exp of all the target's logits; ``exp(value - logsumexp)`` is a probability"""

    def __repr__(self) -> str:
        """Dtype, shape and device of each tensor: not its numbers."""
        there = ((field.name, getattr(self, field.name)) for field in fields(self))
        return f"{type(self).__name__}({', '.join(f'{n}={_described(t)}' for n, t in there if t is not None)})"

    def _repr_html_(self) -> str:
        """For a notebook: a row for each tensor, and how much of the batch is real and learned."""
        there = [(field.name, getattr(self, field.name)) for field in fields(self)]
        rows = [(name, _described(tensor)) for name, tensor in there if tensor is not None]
        return html_table(f"{type(self).__name__}{self._filled()}", ("field", "dtype, shape"), rows)

    def _filled(self) -> str:
        masks = (self.attention_mask, self.loss_mask)
        if not all(isinstance(mask, Tensor) and mask.is_cpu and mask.numel() for mask in masks):
            return ""
        real, learned = (int(mask.sum()) for mask in masks)
        padding = 100 - 100 * real / self.attention_mask.numel()
        return f": {real:,} tokens, {learned:,} learned, {padding:.0f} % padding"

    def to(self, device: torch.device | str, non_blocking: bool = False) -> DFlashTargetBatch:
        """A batch with every tensor on ``device``; the same tensors where they are there already."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> DFlashTargetBatch:
        """A batch in page-locked host memory, from which copies to a CUDA device are asynchronous."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> DFlashTargetBatch:
        values = (getattr(self, field.name) for field in fields(self))
        moved: list[Any] = [None if value is None else function(value) for value in values]
        return type(self)(*moved)


def _described(tensor: Any) -> str:
    if not isinstance(tensor, Tensor):
        return repr(tensor)
    where = "" if tensor.is_cpu else f" on {tensor.device}"
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}{where}"
