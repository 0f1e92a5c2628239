"""The factors of a target whose layers are not in this process: its code is run around them, with its embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from extractor.target.factors import Factors, measured_factors
from extractor.target.hooks import HFDFlashTargetModel
from extractor.target.unloaded import auto_class


def factors_around_layers(config: Any, embeddings: Any, trust_remote_code: bool) -> Factors | None:
    """What :func:`measured_factors` finds where every layer gives what it takes.

    Args:
        config: of the target.
        embeddings: its own, whole; see ``TargetBackend.embeddings``.
        trust_remote_code: run code that comes with the target.

    Returns:
        None where transformers' code for this target cannot be run so.
    """
    weight = embeddings.get_input_embeddings().weight
    try:
        with torch.device("meta"):
            model = auto_class(config).from_config(config, dtype=weight.dtype, trust_remote_code=trust_remote_code)
        target = HFDFlashTargetModel(model, [0])
        layers = target._get_transformer_layers()
        inside = {id(part) for layer in layers for part in layer.modules()}
        for layer in layers:
            layer.forward = _unchanged
        embed, head = model.get_input_embeddings(), model.get_output_embeddings()
        embed.weight = _own(weight)
        if head is not None:
            stored = embeddings.get_output_embeddings()
            head.weight = _own(stored.weight)
            if stored.bias is not None:
                head.bias = _own(stored.bias)
        for part in (part for part in model.modules() if id(part) not in inside):
            _fill(part)
        return measured_factors(target)
    except (NotImplementedError, RuntimeError, ValueError, ImportError, TypeError, AttributeError, IndexError):
        return None


def _unchanged(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states


def _own(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)


def _fill(part: nn.Module) -> None:
    """What is still without memory. Norms then only norm, for one."""
    for name, parameter in list(part.named_parameters(recurse=False)):
        if parameter.is_meta:
            part.register_parameter(name, _own(torch.ones(parameter.shape, dtype=parameter.dtype)))
    for name, buffer in list(part.named_buffers(recurse=False)):
        if buffer.is_meta:
            part.register_buffer(name, torch.ones(buffer.shape, dtype=buffer.dtype), persistent=False)
