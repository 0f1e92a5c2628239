"""What a target multiplies its embeddings and logits by: Granite, Cohere, MiniCPM and others do it outside of them.

Tried out on the loaded target, not looked up by its name: the first layer's input is compared with the embedding, the
logits with what the LM head gives.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from extractor.target.hooks import HFDFlashTargetModel, logits_of

_TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Largest difference, as a share of the whole, that passes as rounding. A factor left out is off by far more."""

_NAMED = 1e-3
"""How near a measured factor must be to one that the configuration names, to be taken for that."""

_PROBED_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class Factors:
    """How the cache's embeddings become what the target computes; see ``TargetInfo``, which has the same fields."""

    input_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float = 0.0
    head_problem: str = ""


def measured_factors(target: HFDFlashTargetModel) -> Factors:
    """Run the whole target once on two short random rows and compare.

    The difference of two rows is compared for the embedding, so that what is added at each position does not matter.
    """
    seen = _probe(target)
    config = getattr(target.model, "config", None)
    factors = Factors()
    if "embedded" in seen and "first_input" in seen:
        (one, other), (x_one, x_other) = seen["embedded"], seen["first_input"]
        dtype = seen["embedded"].dtype
        scale = _ratio(x_one - x_other, one - other, _TOLERANCE.get(dtype, 0.0))
        factors = replace(factors, input_scale=1.0 if scale is None else _named(scale, config))
    if target.get_output_embeddings() is None:
        return factors
    if "head" not in seen or "logits" not in seen or seen["head"].shape != seen["logits"].shape:
        return replace(factors, head_problem="its logits do not come from its LM head alone")
    return replace(factors, **_of_head(seen["head"], seen["logits"], config))


def _of_head(head: Tensor, logits: Tensor, config: Any) -> dict[str, Any]:
    tolerance = _TOLERANCE.get(head.dtype, 0.0)
    cap = float(_setting(config, "final_logit_softcapping") or 0.0)
    before = logits.double()
    if cap:
        before = cap * torch.atanh((before / cap).clamp(-1 + 1e-9, 1 - 1e-9))
        # Where the cap has flattened the logits nothing can be told.
        certain = before.abs() < cap
        head, before, logits = head[certain], before[certain], logits[certain]
    scale = _ratio(before, head, tolerance)
    if scale is None:
        return {"head_problem": "its logits are not those of its LM head times a factor"}
    return {"logit_scale": _named(scale, config), "logit_softcap": cap}


@torch.inference_mode()
def _probe(target: HFDFlashTargetModel) -> dict[str, Tensor]:
    """``[2, S, ...]`` each: what the embedding gives, what the first layer takes, what the head gives, the logits."""
    seen: dict[str, Tensor] = {}

    def output_to(name: str) -> Any:
        return lambda _module, _inputs, output: seen.__setitem__(name, output.detach().cpu())

    def first_input(_module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        states = inputs[0] if inputs else named.get("hidden_states")
        if isinstance(states, Tensor):
            seen["first_input"] = states.detach().cpu()

    embed, head = target.get_input_embeddings(), target.get_output_embeddings()
    vocabulary = embed.weight.shape[0]
    random = torch.Generator().manual_seed(0)
    # Special tokens, which may stand for images, are at either end of a vocabulary.
    ids = torch.randint(vocabulary // 4, max(vocabulary // 2, 2), (2, _PROBED_TOKENS), generator=random)
    with ExitStack() as hooks:
        handles = [embed.register_forward_hook(output_to("embedded"))]
        handles.append(target._get_transformer_layers()[0].register_forward_pre_hook(first_input, with_kwargs=True))
        if head is not None:
            handles.append(head.register_forward_hook(output_to("head")))
        for handle in handles:
            hooks.callback(handle.remove)
        output = target.model(input_ids=ids.to(embed.weight.device), **target.forward_flags())
    if head is not None:
        seen["logits"] = logits_of(output).detach().cpu()
    return seen


def _ratio(whole: Tensor, part: Tensor, tolerance: float) -> float | None:
    """The number that ``whole`` is ``part`` times; None where there is none."""
    if whole.shape != part.shape or not part.numel():
        return None
    whole, part = whole.double(), part.double()
    scale = float((whole * part).sum() / part.square().sum().clamp_min(1e-300))
    error = float((whole - scale * part).norm() / whole.norm().clamp_min(1e-300))
    return scale if error <= tolerance and math.isfinite(scale) and scale else None


def _named(measured: float, config: Any) -> float:
    """The number that the configuration names, or its inverse, where the measured one is that but for rounding."""
    candidates = (1.0, *(n for value in _numbers(config) for n in (value, 1 / value)))
    nearest = min(candidates, key=lambda number: abs(number / measured - 1))
    return nearest if abs(nearest / measured - 1) <= _NAMED else measured


def _numbers(config: Any) -> Iterator[float]:
    fields = {} if config is None or not hasattr(config, "get_text_config") else config.get_text_config().to_dict()
    for value in fields.values():
        if isinstance(value, int | float) and not isinstance(value, bool) and value and math.isfinite(value):
            yield float(value)


def _setting(config: Any, name: str) -> Any:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, name, None)


def named_factors(config: Any) -> Factors:
    """As the configuration names them, for a target that cannot be tried out in one process; not compared."""
    divided = _setting(config, "logits_scaling")
    return Factors(
        input_scale=float(_setting(config, "embedding_multiplier") or 1.0),
        logit_scale=1 / divided if divided else float(_setting(config, "logit_scale") or 1.0),
        logit_softcap=float(_setting(config, "final_logit_softcapping") or 0.0),
    )
