"""SpecForge: EAGLE-3 and P-EAGLE."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from cache_format import FeatureCache
from peer_checks.common import LAYERS, awake, online, target_of, told
from peer_checks.specforge import loss_of, right_and_wrong


def soft_cross_entropy(logits: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Of probabilities ``target [B, S, V]`` where ``mask [B, S, 1]`` is 1, over all places."""
    return -(mask * target * logits.float().log_softmax(2)).sum(2).mean()


def eagle3(work: Path) -> None:
    """Its strategies, heads and losses of both; P-EAGLE in batches of 1."""
    # Their loss is a kernel for GPUs: the same sum, by torch.
    kernels = ModuleType("specforge.core.loss")
    kernels.LogSoftmaxLoss = SimpleNamespace(apply=soft_cross_entropy)  # type: ignore[attr-defined]
    sys.modules[kernels.__name__] = kernels
    from specforge.algorithms.eagle3.model import OnlineEagle3Model
    from specforge.algorithms.peagle.model import OnlinePEagleModel
    from specforge.modeling.draft.llama3_eagle import LlamaForCausalLMEagle3
    from specforge.modeling.draft.peagle import PEagleDraftModel
    from specforge.training.strategies.base import Eagle3TrainStrategy, PEagleTrainStrategy

    shape = target_of(work).config
    torch.manual_seed(1)
    draft = awake(LlamaForCausalLMEagle3(config_of(shape), attention_backend="sdpa"))
    model = OnlineEagle3Model(draft_model=draft, length=2, attention_backend="sdpa")
    compared(work, "eagle3", Eagle3TrainStrategy, model, 2)
    draft = awake(PEagleDraftModel(config_of(shape)))
    compared(work, "peagle", PEagleTrainStrategy, OnlinePEagleModel(draft, mask_token_id=5, num_depths=4), 1)


def config_of(shape: Any) -> Any:
    """A draft of one layer with the sizes of its target, and all its tokens."""
    from transformers import LlamaConfig

    names = ("hidden_size", "intermediate_size", "vocab_size", "head_dim", "num_attention_heads", "num_key_value_heads")
    config = LlamaConfig(**{name: getattr(shape, name) for name in names}, num_hidden_layers=1)
    config.draft_vocab_size = shape.vocab_size
    return config


def compared(work: Path, name: str, kind: Any, model: Any, batch_size: int) -> None:
    """The losses of one strategy."""
    from cache_format.adapters.specforge import Batches, target_head

    cache, target = FeatureCache.open(work / "cache").view(layers=LAYERS), target_of(work)
    strategy, losses = kind(model, target_head=target_head(cache)), []
    for batch in Batches(cache.loader(batch_size), name):
        states, last = online(target, batch.tensors["input_ids"], LAYERS)
        now = {**batch.tensors, "hidden_state": states, "target": last}
        there = right_and_wrong(now, ["hidden_state", "target"], batch.metadata)
        losses.append(tuple(loss_of(strategy, some) for some in (batch, *there)))
    told(f"SpecForge {name}", losses)
