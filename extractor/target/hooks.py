"""HFDFlashTargetModel: capture chosen decoder layers of a frozen causal LM with forward hooks.

The online side of the project's promise: what it gives for a batch is what the cache gives for the same rows.
Names and behaviour follow the class of that name in NeMo AutoModel, so either can stand for the other.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cache_format.batch import DFlashTargetBatch

_LAYER_PATHS = (
    ("model", "layers"),
    ("layers",),
    ("transformer", "h"),
    ("model", "language_model", "layers"),
    ("language_model", "model", "layers"),
    ("language_model", "layers"),
    ("model", "language_model", "model", "layers"),
)
"""Where decoders keep their layers; the later ones are multimodal models whose text decoder is a part."""


class HFDFlashTargetModel:
    """A frozen target whose decoder layers ``target_layer_ids`` are captured.

    A hook on layer i captures that layer's output: ``hidden_states[i + 1]`` of transformers'
    ``output_hidden_states``. The last layer is the exception: transformers reports it after the final norm, the hook
    sees it before.
    """

    def __init__(self, model: nn.Module, target_layer_ids: Sequence[int], capture_logits: bool = False):
        """``capture_logits`` also keeps the target's logits in the batch.

        Raises:
            ValueError: no layer, one named twice, or one out of bounds.
        """
        self.model = model.eval()
        self.target_layer_ids = self._validate_layer_ids(target_layer_ids)
        self.capture_logits = capture_logits
        self.before_pass: Callable[..., None] | None = None
        """called before each pass of TransformersBackend; see tensor_parallel.py"""

    def _num_hidden_layers(self) -> int:
        config: Any = self.model.config
        decoder = config if hasattr(config, "num_hidden_layers") else config.text_config
        return int(decoder.num_hidden_layers)

    def _validate_layer_ids(self, target_layer_ids: Sequence[int]) -> list[int]:
        ids, num_layers = [int(i) for i in target_layer_ids], self._num_hidden_layers()
        if not ids:
            raise ValueError("DFlash needs at least one target layer id")
        for layer_id in ids:
            if not 0 <= layer_id < num_layers:
                raise ValueError(f"target layer id {layer_id} is out of bounds for a model of {num_layers} layers")
        if len(set(ids)) != len(ids):
            raise ValueError(f"target layer ids {ids} name a layer twice")
        return ids

    def _get_transformer_layers(self) -> list[nn.Module]:
        """The decoder layers in order: at a known place, or else the only list of as many modules as there are layers.

        Raises:
            ValueError: neither is there.
        """
        for path in _LAYER_PATHS:
            container: Any = self.model
            for name in path:
                container = getattr(container, name, None)
            if isinstance(container, nn.ModuleDict):
                return [container[str(i)] for i in range(len(container))]
            if container is not None:
                return list(container)
        total = self._num_hidden_layers()
        lists = [m for m in self.model.modules() if isinstance(m, nn.ModuleList) and len(m) == total]
        if len(lists) == 1:
            return list(lists[0])
        known = ", ".join(".".join(path) for path in _LAYER_PATHS)
        raise ValueError(
            f"{type(self.model).__name__} has its decoder layers at none of {known}, "
            f"and {len(lists)} lists of {total} modules elsewhere"
        )

    def compile(self) -> None:
        """torch.compile each decoder layer up to the last captured one; hooks stay outside of what is compiled."""
        for layer in self._get_transformer_layers()[: max(self.target_layer_ids) + 1]:
            layer.forward = torch.compile(layer.forward, dynamic=True)

    @contextmanager
    def hooked(self, on_output: Callable[[int, Tensor], None]) -> Iterator[None]:
        """Call ``on_output(position in target_layer_ids, output [B, S, H])`` as each captured layer finishes."""
        layers = self._get_transformer_layers()

        def hook_for(position: int) -> Callable[..., None]:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                on_output(position, output[0] if isinstance(output, tuple) else output)

            return hook

        handles = [
            layers[layer_id].register_forward_hook(hook_for(position))
            for position, layer_id in enumerate(self.target_layer_ids)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def forward_flags(self) -> dict[str, bool]:
        """Those of transformers' flags that the model's forward declares, all off."""
        declared = inspect.signature(self.model.forward).parameters
        return {name: False for name in ("output_hidden_states", "output_attentions", "use_cache") if name in declared}

    @torch.no_grad()
    def generate_batch(self, input_ids: Tensor, attention_mask: Tensor, loss_mask: Tensor) -> DFlashTargetBatch:
        """Run the whole target on ``[B, S]`` ids and masks; ``hidden_states`` is ``[B, S, L*H]`` in the model's dtype.

        Layers are concatenated in the order of ``target_layer_ids``; nothing is shifted. States at padding are
        whatever the target computed there.

        Raises:
            RuntimeError: a captured layer did not run.
        """
        captured: dict[int, Tensor] = {}
        with self.hooked(captured.__setitem__):
            output = self.model(input_ids=input_ids, attention_mask=attention_mask, **self.forward_flags())
        if len(captured) != len(self.target_layer_ids):
            ran = [self.target_layer_ids[position] for position in sorted(captured)]
            raise RuntimeError(f"Expected {len(self.target_layer_ids)} captured layers but got {len(ran)}: {ran}")
        return DFlashTargetBatch(
            hidden_states=torch.cat([captured[position] for position in range(len(captured))], dim=-1),
            input_ids=input_ids,
            attention_mask=attention_mask,
            loss_mask=loss_mask,
            logits=logits_of(output) if self.capture_logits else None,
        )

    def get_input_embeddings(self) -> nn.Embedding:
        """The target's token embedding ``[V, H]``; what a model multiplies it by (Gemma) is not in its weight."""
        return self.model.get_input_embeddings()  # type: ignore[operator]

    def get_output_embeddings(self) -> nn.Linear | None:
        """The target's LM head; None where it has none."""
        return self.model.get_output_embeddings()  # type: ignore[operator]


def logits_of(output: Any) -> Tensor:
    """``[B, S, V]``, of whatever a model's forward gives."""
    if isinstance(output, Tensor):
        return output
    return output[0] if isinstance(output, tuple) else output.logits
