"""Captures: what a cache holds of the target beside hidden_states, for losses that need the target's own prediction.

Off by default; each is a tensor with one row a token in every shard and an optional field of the same name in
DFlashTargetBatch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

LAST_HIDDEN_STATES = "last_hidden_states"
TOPK_VALUES = "logits_topk_values"
TOPK_IDS = "logits_topk_ids"
LOGSUMEXP = "logits_logsumexp"


@dataclass(frozen=True, kw_only=True)
class Captures:
    """Which captures a cache has."""

    last_hidden_states: bool = False
    """``[T, H]``: what the LM head takes, after the final norm (DSpark: the head gives the target's logits from it)"""
    logits_topk: int = 0
    """K > 0: the K largest logits of the target, their token ids and the log-sum-exp of all (JetSpec's distillation):
    ``exp(value - logsumexp)`` is the target's probability"""

    def __post_init__(self) -> None:
        if type(self.last_hidden_states) is not bool or type(self.logits_topk) is not int or self.logits_topk < 0:
            raise ValueError(f"captures {self!r}: last_hidden_states is true or false, logits_topk a number from 0")

    def to_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return asdict(self)

    @staticmethod
    def from_dict(stored: Any) -> Captures:
        """From the manifest.

        Raises:
            ValueError: not what :meth:`to_dict` gives.
        """
        if not isinstance(stored, dict) or set(stored) != set(asdict(Captures())):
            raise ValueError(f"capture {stored!r} is unknown to this version")
        return Captures(**stored)
