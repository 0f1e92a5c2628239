"""In vLLM's worker processes: a loader that stops where the job does - no layer after the last captured, no LM head.

Layers are left out as a pipeline's stage leaves out those of the others, so the configuration stays whole: some models
compute with their number of layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.utils import PPMissingLayer

# vLLM looks for it here, so that its workers import the loader.
from extractor.target.vllm.capture import CaptureExtension as CaptureExtension
from extractor.target.vllm.processes import speak_in_lines

speak_in_lines()

LOAD_FORMAT, EXTENSION = "dflash_cache", f"{__name__}.CaptureExtension"
NUM_LAYERS = "num_layers"
"""Key in vLLM's ``model_loader_extra_config``: layers to load, from the first on."""

_FILLED = ("UnquantizedLinearMethod", "UnquantizedEmbeddingMethod")
"""Of layers that have no tensor but those in the files, all of the sizes there."""

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_HEAD = "lm_head."


@register_model_loader(LOAD_FORMAT)
class TruncatedLoader(DefaultModelLoader):
    """The first layers of a target, as the default loader loads them."""

    def __init__(self, load_config: Any):
        self._num_layers = int(load_config.model_loader_extra_config[NUM_LAYERS])
        super().__init__(replace(load_config, load_format="auto", model_loader_extra_config={}))

    def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> nn.Module:
        """The model; its logits are zeros, for nobody asks for a token."""
        import vllm.distributed.utils as distributed

        whole = distributed.get_pp_indices

        def truncated(num_layers: int, rank: int, size: int) -> tuple[int, int]:
            return whole(min(self._num_layers, num_layers), rank, size)

        distributed.get_pp_indices = truncated
        try:
            model = super().load_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
        finally:
            distributed.get_pp_indices = whole
        head = _own_head(model)
        for parameter in () if head is None else head.parameters():
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
        vocabulary = model_config.get_vocab_size()
        model.compute_logits = lambda states, *_, **__: states.new_zeros(len(states), vocabulary)
        return model

    def get_all_weights(self, model_config: Any, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Those of the layers to load and of what surrounds them."""
        _leave_out(model, self._num_layers, model_config.hf_text_config.num_hidden_layers)
        _forget(model)
        skip_head = _own_head(model) is not None or not hasattr(model, "lm_head")
        for name, tensor in super().get_all_weights(model_config, model):
            layer = _LAYER.search(name)
            if (layer and int(layer[1]) >= self._num_layers) or (skip_head and name.startswith(_HEAD)):
                continue
            yield name, tensor

    def track_weights_loading(self, model: nn.Module, loaded_weights: set[str] | None, *rest: Any, **more: Any) -> None:
        """Refuse weights that no file had, but for the LM head's."""
        if loaded_weights is not None:
            loaded_weights = loaded_weights | {name for name, _ in model.named_parameters() if name.startswith(_HEAD)}
        super().track_weights_loading(model, loaded_weights, *rest, **more)


class _LeftOut(PPMissingLayer):
    """For models whose code runs over all places of their layers: gives what it takes."""

    def forward(self, *arguments: Any, **named: Any) -> Any:
        if "hidden_states" in named:
            return (named["hidden_states"], named["residual"]) if "residual" in named else named["hidden_states"]
        return super().forward(*arguments, **named)


def _leave_out(model: nn.Module, first: int, num_layers: int) -> None:
    """Layers from ``first`` on that this model's code has made in spite of all."""
    for layers in model.modules():
        if isinstance(layers, nn.ModuleList) and len(layers) == num_layers:
            for number in range(first, num_layers):
                layers[number] = _LeftOut()


def _forget(model: nn.Module) -> None:
    """Whatever no file fills is NaN, which the trial finds; vLLM would compute with what happens to be in memory."""
    for module in model.modules():
        if type(getattr(module, "quant_method", None)).__name__ in _FILLED:
            for parameter in module.parameters(recurse=False):
                if parameter.is_floating_point():
                    parameter.data.fill_(float("nan"))


def _own_head(model: nn.Module) -> nn.Module | None:
    """The LM head, unless its weight is the input embedding's too."""
    head = getattr(model, "lm_head", None)
    weight = getattr(head, "weight", None)
    names = [name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter is weight]
    return head if len(names) == 1 else None
