"""What loading made of a target: decided by packages, kernels and hardware, not by its files alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn


def decided_in_fact(model: Any) -> dict[str, Any]:
    """``parameters``: how many tensors have which dtype, such as ``bfloat16 311``, so that a quantised checkpoint
    that was dequantised here and one that is run as it is are told apart; ``experts_implementation``: the kernel of
    a mixture's experts, where transformers has several; ``quantization``, of a model that runs on quantised weights:
    the method, and how many tensors and modules of which kind hold them."""
    kinds = Counter(str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters())
    decided: dict[str, Any] = {"parameters": ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items()))}
    experts = getattr(getattr(model, "config", None), "_experts_implementation", None)
    if experts is not None:
        decided["experts_implementation"] = experts
    quantiser = getattr(model, "hf_quantizer", None)
    if quantiser is not None:
        method = quantiser.quantization_config.quant_method
        decided["quantization"] = ", ".join([str(getattr(method, "value", method)), *_of_packages(model)])
    return decided


def _of_packages(model: Any) -> list[str]:
    """What neither torch.nn nor the model's own file defines: tensors and modules of the package for quantised ones."""
    kinds = Counter(type(tensor).__name__ for tensor in model.parameters() if type(tensor) is not nn.Parameter)
    known = (type(model).__module__, "torch.nn", "transformers.activations", "transformers.models")
    kinds += Counter(type(part).__name__ for part in model.modules() if not type(part).__module__.startswith(known))
    return [f"{kind} {count}" for kind, count in sorted(kinds.items())]
