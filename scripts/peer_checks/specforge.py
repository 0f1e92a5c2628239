"""SpecForge."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from cache_format import FeatureCache
from peer_checks.common import LAYERS, awake, late, online, target_of, told

DRAFTS = {"markov_rank": 8, "markov_head_type": "vanilla", "emb_dim": 8, "gru_hidden_dim": 8}
"""What SpecForge's Domino and DSpark drafts ask for beside."""


def loss_of(trainer: Any, batch: Any) -> float:
    """A loss of NeMo's recipe or SpecForge's strategy, with the anchors that seed 0 draws."""
    torch.manual_seed(0)
    step = trainer._run_trainer_step if hasattr(trainer, "_run_trainer_step") else trainer.forward_loss
    return float(step(batch).loss.detach())


def right_and_wrong(now: dict[str, torch.Tensor], kinds: list[str], metadata: Any = None) -> list[Any]:
    """Batches of the target's states of now, and of each of ``kinds`` a token late."""
    tensors = [now] + [{**now, kind: late(now[kind])} for kind in kinds]
    return [SimpleNamespace(tensors=some, metadata=metadata or {}) for some in tensors]


def specforge(work: Path) -> None:
    """DFlash, Domino and DSpark."""
    from specforge.algorithms.common import dflash_family_model as models
    from specforge.modeling.draft.dflash import DFlashDraftModel
    from specforge.modeling.draft.domino import DominoDraftModel
    from specforge.modeling.draft.dspark import DSparkDraftModel
    from specforge.training.strategies import base as strategies
    from transformers import Qwen3Config

    from cache_format.adapters.specforge import Batches

    cache, target = FeatureCache.open(work / "cache").view(layers=LAYERS), target_of(work)
    shape = target.config
    head, embed = cache.get_output_embeddings(), cache.get_input_embeddings()
    options = {"mask_token_id": 5, "block_size": 4, "attention_backend": "sdpa", "num_anchors": 8}
    for name, draft, model, kind in (
        ("dflash", DFlashDraftModel, models.OnlineDFlashModel, strategies.DFlashTrainStrategy),
        ("domino", DominoDraftModel, models.OnlineDominoModel, strategies.DominoTrainStrategy),
        ("dspark", DSparkDraftModel, models.OnlineDSparkModel, strategies.DSparkTrainStrategy),
    ):
        config = Qwen3Config(
            **{k: getattr(shape, k) for k in ("hidden_size", "intermediate_size", "vocab_size", "head_dim")},
            **{k: getattr(shape, k) for k in ("num_attention_heads", "num_key_value_heads")},
            num_hidden_layers=1,
            attn_implementation="sdpa",
            block_size=4,
            num_target_layers=6,
            dflash_config={"target_layer_ids": LAYERS, **DRAFTS},
        )
        torch.manual_seed(1)
        strategy, losses = kind(model(awake(draft(config)), head, embed, **options)), []
        for batch in Batches(cache.loader(2, filter=lambda index: index.num_loss_tokens >= 8), name):
            states, last = online(target, batch.tensors["input_ids"], LAYERS)
            now = {**batch.tensors, "hidden_states": states}
            now |= {"target_last_hidden_states": last} if name == "dspark" else {}
            kinds = ["hidden_states"] + ["target_last_hidden_states"] * (name == "dspark")
            losses.append(tuple(loss_of(strategy, some) for some in (batch, *right_and_wrong(now, kinds))))
        told(f"SpecForge {name}", losses[:12])


def soft_cross_entropy(logits: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Of probabilities ``target [B, S, V]`` where ``mask [B, S, 1]`` is 1, over all places."""
    return -(mask * target * logits.float().log_softmax(2)).sum(2).mean()


def eagle3(work: Path) -> None:
    """SpecForge's EAGLE-3: its strategy, head and TTT loss."""
    # Its loss is a kernel for GPUs: the same sum, by torch.
    kernels = ModuleType("specforge.core.loss")
    kernels.LogSoftmaxLoss = SimpleNamespace(apply=soft_cross_entropy)  # type: ignore[attr-defined]
    sys.modules[kernels.__name__] = kernels
    from specforge.algorithms.eagle3.model import OnlineEagle3Model
    from specforge.modeling.draft.llama3_eagle import LlamaForCausalLMEagle3
    from specforge.training.strategies.base import Eagle3TrainStrategy
    from transformers import LlamaConfig

    from cache_format.adapters.specforge import Batches, target_head

    cache, target = FeatureCache.open(work / "cache").view(layers=LAYERS), target_of(work)
    shape = target.config
    config = LlamaConfig(
        **{name: getattr(shape, name) for name in ("hidden_size", "intermediate_size", "vocab_size", "head_dim")},
        **{name: getattr(shape, name) for name in ("num_attention_heads", "num_key_value_heads")},
        num_hidden_layers=1,
    )
    config.draft_vocab_size = shape.vocab_size
    torch.manual_seed(1)
    draft = awake(LlamaForCausalLMEagle3(config, attention_backend="sdpa"))
    model = OnlineEagle3Model(draft_model=draft, length=2, attention_backend="sdpa")
    strategy, losses = Eagle3TrainStrategy(model, target_head=target_head(cache)), []
    for batch in Batches(cache.loader(2), "eagle3"):
        states, last = online(target, batch.tensors["input_ids"], LAYERS)
        now = {**batch.tensors, "hidden_state": states, "target": last}
        there = right_and_wrong(now, ["hidden_state", "target"], batch.metadata)
        losses.append(tuple(loss_of(strategy, some) for some in (batch, *there)))
    told("SpecForge eagle3", losses[:6])
