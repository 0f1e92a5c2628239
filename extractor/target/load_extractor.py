"""The target of an extraction: loaded, hooked, tried out on padding, ready to run batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cache_format.errors import InputError
from extractor.config import ExtractOptions
from extractor.target.deterministic import be_deterministic
from extractor.target.forward import HiddenStateExtractor, padding_mode
from extractor.target.hooks import HFDFlashTargetModel
from extractor.target.load_target import load_wanted
from extractor.target.tensor_parallel import Group, whole_embeddings, world_size


@dataclass(frozen=True, kw_only=True)
class LoadedExtractor:
    """What loading gives."""

    extractor: HiddenStateExtractor
    embeddings: nn.Module
    """the target, or with a divided one a stand-in, whose input and output embeddings are whole"""
    decided: dict[str, Any]
    """the part of the identity that only the loaded target decides"""


def load_extractor(
    options: ExtractOptions,
    *,
    dtype: torch.dtype,
    device: torch.device,
    target_layer_ids: list[int],
    longest: int,
    group: Group | None,
) -> LoadedExtractor:
    """Load the target that ``options`` name; of a divided one, this process's part.

    Args:
        options: of the extraction.
        dtype: of the weights.
        device: of this worker.
        target_layer_ids: to capture.
        longest: tokens of the longest sample, on which padding is tried out.
        group: the processes that the target is divided over.

    Raises:
        InputError: a target that cannot be run on padded batches, or not compiled.
    """
    wanted = options.target
    if wanted.deterministic:
        be_deterministic()
    if group is not None:
        group.load()
    model = load_wanted(wanted, dtype, device, tp_size=None if group is None else world_size())
    embeddings = model if group is None else whole_embeddings(model)
    target = HFDFlashTargetModel(model, target_layer_ids)
    target.before_pass = None if group is None else group.announce
    if wanted.compile:
        target.compile()
    padding = _padding_mode(target, longest)
    attention = getattr(model.config, "_attn_implementation", None) or "eager"
    return LoadedExtractor(
        extractor=HiddenStateExtractor(target, padding, options.capture),
        embeddings=embeddings,
        decided={"attn_implementation": attention, "padding": padding},
    )


def _padding_mode(target: HFDFlashTargetModel, longest: int) -> str:
    try:
        return padding_mode(target, longest)
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        raise InputError(
            f"--compile: torch cannot compile this target here: {str(error).splitlines()[0]}. Install what is "
            "missing (Debian: apt-get install g++ python3-dev) and run the same command again, or begin another "
            "cache without --compile"
        ) from error
