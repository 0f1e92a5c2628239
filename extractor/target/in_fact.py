"""What loading made of a target: decided by packages, kernels and hardware, not by its files alone."""

from __future__ import annotations

from collections import Counter
from typing import Any


def decided_in_fact(model: Any) -> dict[str, Any]:
    """``parameters``: how many tensors below the head have which dtype, such as ``bfloat16 311``, so that a quantised
    checkpoint that was dequantised here and one that is run as it is are told apart; ``experts_implementation``: the
    kernel of a mixture's experts, where transformers has several."""
    # Without the head, which may be the embedding's own tensor or a copy of it.
    body = getattr(model, "base_model", model)
    kinds = Counter(str(parameter.dtype).removeprefix("torch.") for parameter in body.parameters())
    decided: dict[str, Any] = {"parameters": ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items()))}
    experts = getattr(getattr(model, "config", None), "_experts_implementation", None)
    mixture = any(name.endswith("experts") for name, _ in model.named_modules())
    return decided if experts is None or not mixture else {**decided, "experts_implementation": experts}
