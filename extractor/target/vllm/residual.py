"""In vLLM's worker processes: is the residual in what a layer gives, or is it left for the next layer to add?

Most layers of vLLM give two tensors to be added, some give the sum and what it was made of. Their names do not tell. So
the first pass does: the final norm makes the model's output of the last layer's, and of one of the two alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest difference, as a share of the whole, that passes as rounding."""

Taken = Tensor | tuple[Tensor, Tensor]
"""States, or before that is decided: with the residual, and without."""


class Residual:
    """Of the layers of one worker."""

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module], *, last: bool):
        """
        Args:
            model: whole, as this worker has it.
            layers: of it, in order, those that this worker has.
            last: whether the model's last layers are among them.
        """
        self._added: bool | None = None if last else True
        self._last_layer: Taken | None = None
        self._outputs: list[tuple[nn.Module, Tensor]] = []
        self._handles = []
        if last:
            inside = {id(part) for layer in layers for part in layer.modules()}
            parts = [part for part in model.modules() if id(part) not in inside and not list(part.children())]
            self._handles = [part.register_forward_hook(self._keep) for part in parts]
            self._handles.append(layers[-1].register_forward_hook(self._keep_last))

    def take(self, output: Any) -> Taken:
        """What a layer has given, copied: the next layer may write over it."""
        states, residual = (*output, None)[:2] if isinstance(output, tuple) else (output, None)
        if residual is None or self._added is False:
            return states.clone()
        whole = states + residual
        return whole if self._added else (whole, states.clone())

    def states(self, taken: Taken) -> Tensor:
        """Of what was taken, once it is decided."""
        return taken if isinstance(taken, Tensor) else taken[0 if self._added else 1]

    @torch.no_grad()
    def decide(self, output: Tensor, *, alone: bool) -> None:
        """After a pass, of which ``output`` is the model's; only the first one is looked at.

        Args:
            output: ``[tokens, H]``
            alone: whether no other worker has layers of this model.

        Raises:
            ValueError: neither makes the output, or another worker has decided without knowing.
        """
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        norm = next((module for module, given in reversed(self._outputs) if given is output), None)
        last, self._last_layer, self._outputs = self._last_layer, None, []
        if norm is None or last is None:
            raise ValueError("what this model gives is not its final norm's, so its layers' outputs cannot be checked")
        both = (last,) if isinstance(last, Tensor) else last
        errors = [_difference(norm(states), output) for states in both]
        best = min(range(len(both)), key=errors.__getitem__)
        if not errors[best] <= TOLERANCE[output.dtype]:
            raise ValueError("this model's output is not what its final norm makes of its last layer's states")
        self._added = best == 0
        if not self._added and not alone:
            raise ValueError(
                "the layers of this model add the residual themselves, which the stages before the last "
                "cannot tell; use --tensor-parallel instead of --pipeline-parallel"
            )

    def _keep(self, module: nn.Module, _inputs: Any, output: Any) -> None:
        self._outputs.append((module, output[0] if isinstance(output, tuple) else output))

    def _keep_last(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self._last_layer = self.take(output)


def _difference(given: Any, expected: Tensor) -> float:
    given = given[0] if isinstance(given, tuple) else given
    return float((given.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-20))
