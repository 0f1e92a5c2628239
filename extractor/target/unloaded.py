"""The target without its weights, on the device meta: what would be refused after loading is refused before."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cache_format.device import accelerators
from cache_format.errors import InputError
from extractor.config import TargetOptions
from extractor.target.gguf_file import place_and_file


def auto_class(config: Any) -> Any:
    """Of transformers' classes that load a model by its configuration, the one that knows this kind of target."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    known = type(config) in AutoModelForCausalLM._model_mapping
    known = known or "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    return AutoModelForCausalLM if known else AutoModelForImageTextToText


def require_runnable(target: TargetOptions, config: Any, dtype: torch.dtype) -> None:
    """Refuse ``--experts-implementation`` for a target without experts, a ``--device-map`` that would offload, a GGUF
    file where nothing can read it, and an attention kernel that computes something else.

    A target that cannot be built without its weights, or whose quantised weights have other sizes than its
    configuration tells, is left to :func:`require_experts` and :func:`require_on_devices` after loading.

    Raises:
        InputError: names the option.
    """
    if place_and_file(target.name)[1] is not None and (target.backend == "vllm" or target.tp_plan):
        option = "--tp-plan" if target.tp_plan else "--backend vllm"
        raise InputError(
            f"--target {target.name}: {option} takes no GGUF; leave it out, or give the target as safetensors"
        )
    if target.attn_implementation == "sdpa" and caps_attention(config):
        raise InputError(
            "--attn-implementation sdpa: this target caps its attention scores (attn_logit_softcapping), which that "
            "kernel leaves out; use eager or flash_attention_2, or leave the option out"
        )
    if target.experts_implementation is None and target.device_map is None:
        return
    model = built(config, dtype, target.trust_remote_code)
    if model is None:
        return
    if target.experts_implementation is not None:
        require_experts(model)
    if target.device_map is not None and getattr(config, "quantization_config", None) is None:
        _require_room(model, target.device_map)


def caps_attention(config: Any) -> bool:
    """Whether attention scores are capped, as Gemma 2's; transformers 5.19 takes sdpa, which leaves the cap out."""
    return bool(getattr(config.get_text_config(), "attn_logit_softcapping", None))


def require_experts(model: nn.Module) -> None:
    """Refuse ``--experts-implementation``.

    Raises:
        InputError: ``model`` has no experts that it could choose a kernel for.
    """
    from transformers.integrations import moe

    # Experts with a choice of kernels have a forward from there. A dense model may come from a file that has such, too.
    if not any(getattr(type(part).forward, "__globals__", None) is vars(moe) for part in model.modules()):
        raise InputError(f"--experts-implementation: {type(model).__name__} has no experts to choose it for")


def require_on_devices(model: nn.Module, device_map: str) -> None:
    """Refuse weights on the CPU beside accelerators, or on the disk: they would cross the bus again in each batch.

    Raises:
        InputError: ``model``, which is loaded, has such.
    """
    elsewhere = {"meta", "cpu"} if accelerators() else {"meta"}
    weights = list(model.parameters())
    off = sum(weight.nbytes for weight in weights if weight.device.type in elsewhere)
    _refuse_offloading(device_map, off, sum(weight.nbytes for weight in weights))


def _require_room(model: Any, device_map: str) -> None:
    try:
        from transformers.integrations.accelerate import _get_device_map

        places = _get_device_map(model, device_map, None, None)
    except (ImportError, TypeError, ValueError):
        return
    elsewhere = {"disk", "cpu"} if accelerators() else {"disk"}
    weights = dict(model.named_parameters())
    off = sum(
        weight.nbytes
        for name, weight in weights.items()
        if str(places.get(_longest_prefix(name, places), "cpu")) in elsewhere
    )
    _refuse_offloading(device_map, off, sum(weight.nbytes for weight in weights.values()))


def _longest_prefix(name: str, places: Any) -> str:
    while name and name not in places:
        name = name.rpartition(".")[0]
    return name


def _refuse_offloading(device_map: str, off: int, whole: int) -> None:
    if off:
        raise InputError(
            f"--device-map {device_map}: {off:,} of the target's {whole:,} bytes of weights do not fit on the devices "
            "here and would be offloaded, read again in each batch; use more or larger devices, or a smaller --dtype"
        )


def built(config: Any, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """The model of ``config`` without memory for its weights; None where its code cannot do without."""
    try:
        with torch.device("meta"):
            return auto_class(config).from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except (NotImplementedError, RuntimeError, ValueError, ImportError, TypeError, AttributeError):
        return None
