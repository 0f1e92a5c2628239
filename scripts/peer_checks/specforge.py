"""SpecForge: DFlash, Domino and DSpark."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from cache_format import FeatureCache
from peer_checks.common import LAYERS, awake, late, online, target_of, told

DRAFTS = {"markov_rank": 8, "markov_head_type": "vanilla", "emb_dim": 8, "gru_hidden_dim": 8}
"""What SpecForge's Domino and DSpark drafts ask for beside."""


@torch.no_grad()
def loss_of(strategy: Any, batch: Any) -> float:
    """A training loss, with the anchors that seed 0 draws; without gradients, which flex attention has not on a CPU."""
    torch.manual_seed(0)
    return float(strategy.forward_loss(batch).loss)


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
