"""vLLM behind the seam: batches as requests of an engine, their rows as its workers have left them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cache_format.device import CPU
from cache_format.layout.captures import LAST_HIDDEN_STATES, Captures
from extractor.target.backend import TargetBackend
from extractor.target.factors import Factors
from extractor.target.vllm.engine import Engine


class VllmBackend(TargetBackend):
    """Runs batches through an engine; nothing is padded, and nothing of the target is in this process."""

    def __init__(
        self,
        engine: Engine,
        target_layer_ids: Sequence[int],
        hidden_size: int,
        dtype: torch.dtype,
        captures: Captures,
        *,
        embeddings: Any,
        factors: Factors | None,
        decided: Mapping[str, Any],
    ):
        """
        Args:
            engine: that captures these layers and captures.
            target_layer_ids: in the order of the feature dimension.
            hidden_size: H.
            dtype: of the states.
            captures: beside hidden_states; no logits.
            embeddings: as :attr:`TargetBackend.embeddings`.
            factors: as :attr:`TargetBackend.factors`.
            decided: as :attr:`TargetBackend.decided`.
        """
        super().__init__(target_layer_ids, hidden_size, dtype, captures)
        self._engine, self._embeddings, self._decided = engine, embeddings, dict(decided)
        self._factors = factors

    @property
    def decided(self) -> dict[str, Any]:
        """See :class:`TargetBackend`: kernel, version, quantisation and what else of vLLM changes rounding."""
        return self._decided

    @property
    def embeddings(self) -> Any:
        """See :class:`TargetBackend`; read from the weight files."""
        return self._embeddings

    @property
    def factors(self) -> Factors | None:
        """See :class:`TargetBackend`; of transformers' code for the target, which runs without its layers."""
        return self._factors

    @property
    def most_tokens(self) -> int:
        """Of one step."""
        return self._engine.most_tokens

    @property
    def repeatable(self) -> bool:
        """See :class:`TargetBackend`: an engine that has run out of memory is gone."""
        return False

    def rows_device(self, device: torch.device) -> torch.device:
        """See :class:`TargetBackend`: rows come in host memory, whatever device the engine is on."""
        return CPU

    def find_batch_tokens(self, device: torch.device, longest: int, total: int) -> int:
        """See :class:`TargetBackend`; an engine is made for one size, so options refuse ``auto``."""
        return self._engine.most_tokens

    def close(self) -> None:
        """See :class:`TargetBackend`."""
        self._engine.close()

    def forward(
        self, input_ids: Tensor, lengths: Sequence[int], out: Tensor, extra: Mapping[str, Tensor] | None = None
    ) -> None:
        """See :class:`TargetBackend`.

        Raises:
            EngineError: the engine has died, or its answer is not what was asked for.
        """
        width = out.shape[1]
        tokens = input_ids.numpy()
        for rows, states in self._engine.run([tokens[row, :length] for row, length in enumerate(lengths)]):
            out[rows].copy_(states[:, :width])
            if extra and LAST_HIDDEN_STATES in extra:
                extra[LAST_HIDDEN_STATES][rows].copy_(states[:, width:])
