"""A target whose weights are quantised: how, whether it runs here, and the dtype that it really computes in.

What is stored are its activations as they come: nothing of such a target is cast. Which dtype that is, its checkpoint
and the package that runs it decide; some take any that is asked for, others have their own, or one that a kernel wants.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from cache_format.codecs.dtypes import torch_dtype
from cache_format.errors import InputError
from extractor.config import TargetOptions
from extractor.target.load_target import resolve_dtype

ANY_DTYPE = frozenset(("torchao", "compressed-tensors", "mxfp4"))
"""Methods that were seen to compute in whatever dtype is asked for; others in that of their checkpoint."""

_PLAIN = (torch.float32, torch.bfloat16, torch.float16)
_ROWS_AT_ONCE = 4096


def method_of(config: Any) -> str | None:
    """``fp8``, ``mxfp4``, ``awq``, ``gptq``, ...: how the weights are quantised; None: they are not."""
    found = _settings(config)
    if found is None:
        return None
    of = found.get if isinstance(found, dict) else lambda name: getattr(found, name, None)
    method = of("quant_method")
    if method is None and (of("load_in_8bit") or of("load_in_4bit")):
        return "bitsandbytes"
    return str(getattr(method, "value", method))


def is_quantised(model: Any) -> bool:
    """Whether a loaded model's weights are quantised as it runs: not where loading dequantised them."""
    return getattr(model, "hf_quantizer", None) is not None


def run_dtype(target: TargetOptions, config: Any, device: torch.device) -> str:
    """Of the states: ``--dtype``, and with auto that of a quantised checkpoint, else the device's usual one.

    Raises:
        InputError: a quantised target that computes in another one, or cannot be run here; says what to do.
    """
    asked = resolve_dtype(target.dtype, device)
    method = method_of(config)
    if method is None or target.backend != "transformers":
        return asked
    own = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None) or torch.bfloat16
    wanted = own if target.dtype == "auto" else torch_dtype(asked)
    runs_in = _updated(target.name, config, device, method, wanted)
    if target.dtype != "auto" and method not in ANY_DTYPE:
        runs_in = _updated(target.name, config, device, method, own)
    if target.dtype != "auto" and runs_in != wanted:
        raise other_dtype(target.name, asked, runs_in)
    return str(runs_in).removeprefix("torch.")


def other_dtype(name: str, asked: str, runs_in: torch.dtype) -> InputError:
    """For a target whose states are not of the dtype that was asked for."""
    runs = str(runs_in).removeprefix("torch.")
    return InputError(
        f"--dtype {asked}: the quantised target {name} computes in {runs}, and its states are stored as they are; "
        f"pass --dtype {runs}, or leave it out"
    )


def _updated(name: str, config: Any, device: torch.device, method: str, dtype: torch.dtype) -> torch.dtype:
    """What the package that runs ``method`` makes of ``dtype`` on ``device``.

    Raises:
        InputError: there is no such package, or it does not run here.
    """
    from transformers.quantizers import AutoHfQuantizer

    settings = copy.deepcopy(_settings(config))
    if not AutoHfQuantizer.supports_quant_method(settings):
        raise InputError(
            f"--target {name}: is quantised by {method}, which transformers does not know and would load as if it "
            "were not; use another copy of the target"
        )
    try:
        quantiser = AutoHfQuantizer.from_config(settings, pre_quantized=True)
        quantiser.validate_environment(device_map={"": device}, weights_only=True)
        updated: torch.dtype = quantiser.update_dtype(dtype)
    except Exception as error:  # whatever those packages raise where one of theirs is missing
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"--target {name}: is quantised by {method}, which cannot be run here: {reason}") from error
    return updated


def _settings(config: Any) -> Any:
    found = getattr(config, "quantization_config", None)
    return getattr(config.get_text_config(), "quantization_config", None) if found is None else found


def dense_weight(module: Any, dtype: torch.dtype) -> Tensor:
    """The weight ``[V, H]`` of an embedding or LM head; of a quantised one, by trying, what it is in ``dtype``."""
    weight = module.weight
    if weight.dtype in _PLAIN and type(weight) in (nn.Parameter, Tensor):
        return weight
    with torch.no_grad():
        if isinstance(module, nn.Embedding):
            ids = torch.arange(module.num_embeddings, device=weight.device)
            return torch.cat([module(some) for some in ids.split(_ROWS_AT_ONCE)])
        unit = torch.eye(module.in_features, dtype=dtype, device=weight.device)
        columns = torch.cat([module(some) for some in unit.split(_ROWS_AT_ONCE)])
        return (columns if module.bias is None else columns - module.bias).T.contiguous()
