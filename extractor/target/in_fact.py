"""What loading made of a target: decided by packages, kernels and hardware, not by its files alone."""

from __future__ import annotations

from collections import Counter
from typing import Any


def decided_in_fact(model: Any) -> dict[str, Any]:
    """``parameters``: how many tensors have which dtype, such as ``bfloat16 311``, so that a quantised checkpoint
    that was dequantised here and one that is run as it is are told apart; ``experts_implementation``: the kernel of
    a mixture's experts, where transformers has several."""
    kinds = Counter(str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters())
    decided: dict[str, Any] = {"parameters": ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items()))}
    experts = getattr(getattr(model, "config", None), "_experts_implementation", None)
    return decided if experts is None else {**decided, "experts_implementation": experts}
