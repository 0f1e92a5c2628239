"""The backend seam: who computes states. transformers is one; the job and the runner know only what stands here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cache_format.codecs.dtypes import DTYPES
from cache_format.device import release_memory, sent
from cache_format.layout.captures import LAST_HIDDEN_STATES, LOGSUMEXP, Captures
from cache_format.layout.shard_layout import capture_tensors
from extractor.target.factors import Factors


class TargetBackend(ABC):
    """A target, loaded: batches of token ids in, rows of states out."""

    def __init__(self, target_layer_ids: Sequence[int], hidden_size: int, dtype: torch.dtype, captures: Captures):
        """``dtype``: of the states, before a codec. ``target_layer_ids``: in the order of the feature dimension."""
        self.target_layer_ids, self.captures = list(target_layer_ids), captures
        self.hidden_size, self.dtype = hidden_size, dtype

    @property
    @abstractmethod
    def decided(self) -> dict[str, Any]:
        """What only the loaded target decides and what can change a byte: a part of the identity."""

    @property
    @abstractmethod
    def embeddings(self) -> Any:
        """Has ``get_input_embeddings()`` and ``get_output_embeddings()``, both whole, for target/ of the cache."""

    @property
    def factors(self) -> Factors | None:
        """What the target multiplies embeddings and logits by; None where it is not found out: the configuration says
        then."""
        return None

    @property
    def repeatable(self) -> bool:
        """Whether a forward that ran out of memory may be tried again: not where other processes run it too."""
        return True

    def rows_device(self, device: torch.device) -> torch.device:
        """Where batches are wanted and rows are given: ``device`` of this worker, or host memory."""
        return device

    @abstractmethod
    def forward(
        self, input_ids: Tensor, lengths: Sequence[int], out: Tensor, extra: Mapping[str, Tensor] | None = None
    ) -> None:
        """Fill ``out [sum(lengths), L*H]`` with the states of the real tokens, row after row of the batch.

        Args:
            input_ids: ``[B, S]`` int64 on the backend's device, right-padded.
            lengths: real tokens of each row, B of them.
            out: on the backend's device, in the stored dtype.
            extra: the captures' tensors by name, each with as many rows as ``out``.

        Raises:
            torch.OutOfMemoryError: the batch does not fit into the device's memory.
        """

    @abstractmethod
    def find_batch_tokens(self, device: torch.device, longest: int, most: int) -> int:
        """The largest batch that fits ``device``, in tokens with padding, for ``--batch-tokens auto``.

        Args:
            device: of this worker.
            longest: tokens of the longest sample.
            most: tokens of the largest shard, which no batch crosses the end of.
        """

    def close(self) -> None:
        """End what other processes of it there are, in a process whose own end nobody waits for."""
        return

    def release_memory(self, device: torch.device) -> None:
        """Give back what is held on ``device`` for the next forward, to try one again that did not fit."""
        release_memory(device)

    def row_memory(self, tokens: int, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        """Memory for the rows of ``tokens`` tokens: hidden_states ``[tokens, L*H]``, and the captures by name."""
        width = len(self.target_layer_ids) * self.hidden_size
        out = torch.empty(tokens, width, dtype=self.dtype, device=device)
        return out, {
            tensor.name: torch.empty(tensor.shape(tokens), dtype=DTYPES[tensor.dtype], device=device)
            for tensor in capture_tensors(self.captures, self.dtype, self.hidden_size)
        }

    @property
    def checked(self) -> list[str]:
        """What the columns of :meth:`nonfinite` stand for."""
        names = [f"layer {layer_id}" for layer_id in self.target_layer_ids]
        names += [LAST_HIDDEN_STATES] if self.captures.last_hidden_states else []
        return names + ([LOGSUMEXP] if self.captures.logits_topk else [])

    @torch.inference_mode()
    def nonfinite(self, out: Tensor, lengths: Sequence[int], extra: Mapping[str, Tensor] | None = None) -> Tensor:
        """Which samples have NaN or Inf, and where: bool ``[B, len(checked)]`` on the device of ``out``."""
        extra, layers = extra or {}, len(self.target_layer_ids)
        # One pass: NaN and Inf survive a float32 sum, and no states but those beyond 1e34 could add up to one.
        sums = [out.view(len(out), layers, -1).sum(-1, dtype=torch.float32)]
        if LAST_HIDDEN_STATES in extra:
            sums.append(extra[LAST_HIDDEN_STATES].sum(-1, keepdim=True, dtype=torch.float32))
        if LOGSUMEXP in extra:
            sums.append(extra[LOGSUMEXP][:, None])
        by_token = torch.cat(sums, dim=1).isfinite().logical_not()
        samples = torch.repeat_interleave(
            torch.arange(len(lengths), device=out.device),
            sent(torch.tensor(lengths), out.device),
            output_size=len(out),
        )
        found = torch.zeros(len(lengths), by_token.shape[1], dtype=torch.int32, device=out.device)
        return found.index_add_(0, samples, by_token.to(torch.int32)).bool()
