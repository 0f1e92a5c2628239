"""How transformers divides a target over processes, by the plans of its architecture; what cannot be is refused."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from typing import Any

import torch

from cache_format.errors import InputError
from extractor.config import TargetOptions
from extractor.target.unloaded import built

_LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_OF_ATTENTION = re.compile(r"attn|attention")
_BY_HEAD = "colwise"
"""transformers' name, of attention's tensors, for those that each process has some heads of."""
_WHOLE = "replicate"
"""transformers' name for what every process has whole."""
_BY_EXPERT = "grouped_gemm"
"""transformers' name for tensors of which each process has those of its experts, by the first dimension."""


def world_size() -> int:
    """Processes that torchrun started.

    Raises:
        InputError: fewer than two.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size < 2:
        raise InputError(
            "--tp-plan divides the target over the processes of torchrun; start it as "
            "`torchrun --nproc-per-node 8 -m extractor extract --tp-plan auto ...`"
        )
    return size


def require_plan(target: TargetOptions, config: Any) -> None:
    """Refuse, before anything is begun, what :func:`parallel_plan` refuses.

    Raises:
        InputError: as it does.
    """
    if target.tp_plan:
        expert_parallel, own_code = target.expert_parallel, target.trust_remote_code
        parallel_plan(config, world_size(), expert_parallel=expert_parallel, trust_remote_code=own_code)


def parallel_plan(config: Any, size: int, *, expert_parallel: bool = False, trust_remote_code: bool = False) -> Any:
    """transformers' ``DistributedConfig`` that divides a target of ``config`` over ``size`` processes.

    Each layer is divided: attention by heads, the rest by columns and rows. With ``expert_parallel`` each process has
    some of the experts whole, and attention whole too where its heads do not divide.

    Raises:
        InputError: transformers cannot divide it so; names the option, and the numbers of processes that work.
    """
    text = config.get_text_config()
    by_layer = getattr(text, "base_model_tp_plan", None) or {}
    options: dict[str, Any] = {"tp_size": size}
    if not expert_parallel and not by_layer:
        instead = "add --expert-parallel" if _experts_plan(text) else "try --device-map auto"
        raise InputError(f"--tp-plan: transformers has none for {config.model_type}; {instead}")
    model = None
    if expert_parallel:
        options["ep_size"] = size
        model = _model_with_experts(config, size, trust_remote_code)
    by_head = any(_OF_ATTENTION.search(rule) and style == _BY_HEAD for rule, style in by_layer.items())
    if by_head and (undivided := _undivided_heads(text, size)):
        if model is None:
            raise undivided
        options["tp_plan"] = {rule: _WHOLE for rule in model.tp_plan if _OF_ATTENTION.search(rule)}
    return _distributed_config(options)


def _undivided_heads(text: Any, size: int) -> InputError | None:
    heads = {name: getattr(text, name, None) or 0 for name in ("num_attention_heads", "num_key_value_heads")}
    for name, count in heads.items():
        if count % size:
            experts = ", or add --expert-parallel, which leaves attention whole" if _experts_plan(text) else ""
            return InputError(
                f"--tp-plan: {size} processes do not divide the target's {count} {name}, and transformers replicates "
                f"none; {_start(_divisors(math.gcd(*heads.values())))}, or use --device-map auto{experts}"
            )
    return None


def _experts_plan(text: Any) -> Any:
    return getattr(text, "base_model_ep_plan", None)


def _model_with_experts(config: Any, size: int, trust_remote_code: bool) -> Any:
    """The model without its weights; None where it cannot be built so.

    Raises:
        InputError: no plan for its experts, no experts, or their number does not divide.
    """
    refused = f"--expert-parallel: transformers has no plan for experts of {config.model_type}"
    if not _experts_plan(config.get_text_config()):
        raise InputError(f"{refused}; leave it out")
    model = built(config, torch.float32, trust_remote_code)
    if model is None:
        return None
    by_expert = {rule for rule, style in getattr(model, "ep_plan", {}).items() if style == _BY_EXPERT}
    tensors = model.named_parameters()
    experts = {len(tensor) for name, tensor in tensors if _LAYER_NUMBER.sub("*", name) in by_expert}
    if not experts:
        raise InputError(f"{refused} as this target has them, or it has none; leave it out")
    if undivided := [count for count in experts if count % size]:
        raise InputError(
            f"--expert-parallel: {size} processes do not divide the target's {undivided[0]} experts; "
            f"{_start(_divisors(math.gcd(*experts)))}, or leave it out"
        )
    return model


def _divisors(number: int) -> list[int]:
    return [some for some in range(2, number + 1) if number % some == 0]


def _start(fit: Iterable[int]) -> str:
    return f"start {' or '.join(map(str, fit))}" if fit else "no number does"


def _distributed_config(options: dict[str, Any]) -> Any:
    try:
        from transformers.distributed import DistributedConfig

        return DistributedConfig(**options)
    except (ImportError, TypeError):
        option, version = ("--expert-parallel", "5.19") if "ep_size" in options else ("--tp-plan", "5.17")
        raise InputError(f"{option} needs transformers {version} or newer; pip install -U transformers") from None
