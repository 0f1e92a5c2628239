"""The norm between the target's last decoder layer and its LM head: a draft that starts from it starts near chance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_NAMES = ("norm", "final_layernorm", "ln_f", "final_norm")
"""Beside the decoder layers, in transformers' models."""


@torch.no_grad()
def final_norm_weight(model: Any) -> Tensor | None:
    """The ``w [H]`` of a model whose last norm is ``w * x / RMS(x)``, tried out on it; None where it is another."""
    base = getattr(model, str(getattr(model, "base_model_prefix", "") or "model"), model)
    norm = next((found for name in _NAMES if isinstance(found := getattr(base, name, None), nn.Module)), None)
    parameters = list(norm.parameters()) if norm is not None else []
    if norm is None or not parameters or parameters[0].ndim != 1 or parameters[0].is_meta:
        return None
    generator, like = torch.Generator().manual_seed(0), parameters[0]
    tried = torch.randn(8, len(like), generator=generator)
    signs = tried[:1].sign()
    try:
        weight = (norm(signs.to(like)).cpu().float() * signs)[0]
        given = norm(tried.to(like)).cpu().float()
    except (RuntimeError, TypeError, ValueError):
        return None
    wanted = weight * tried / tried.square().mean(-1, keepdim=True).sqrt()
    # A mean that is taken off, or a bias, is off by much more than rounding to bfloat16.
    is_alike = (given - wanted).norm() <= 0.02 * wanted.norm()
    return weight.to(like.dtype) if is_alike else None
