"""NeMo AutoModel's EAGLE-3 and P-EAGLE, on batches of ours put as their trainer modules take them: no adapter does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cache_format import FeatureCache
from peer_checks.common import LAYERS, awake, late, target_of, told


def nemo_eagle(work: Path) -> None:
    """Both trainer modules, with the whole vocabulary, and batches of its own target wrapper."""
    from nemo_automodel.components.speculative.eagle.core import Eagle3TrainerModule
    from nemo_automodel.components.speculative.eagle.peagle_trainer import PEagleTrainerModule
    from nemo_automodel.components.speculative.eagle.target import HFEagle3TargetModel

    cache, target = FeatureCache.open(work / "cache").view(layers=LAYERS), target_of(work)
    wrapper, head = HFEagle3TargetModel(target, LAYERS), cache.get_output_embeddings()
    for name, kind, options in (
        ("EAGLE-3", Eagle3TrainerModule, {"ttt_steps": 2}),
        ("P-EAGLE", PEagleTrainerModule, {"num_depths": 4, "mask_token_id": 5}),
    ):
        trainer, losses = kind(draft_of(target, name == "P-EAGLE"), **vocabulary(target), **options), []
        for batch in cache.loader(2):
            now = wrapper.generate_batch(batch.input_ids, batch.attention_mask, batch.loss_mask)
            wrong = [replace(now, **{what: late(getattr(now, what))}) for what in ("aux_hidden_states", "logits")]
            losses.append(tuple(loss_of(trainer, some) for some in (batch_of(batch, head), now, *wrong)))
        told(f"NeMo {name}", losses)


def batch_of(batch: Any, head: torch.nn.Module) -> Any:
    """What its target wrapper gives: tokens, masks and logits ``[B, S, ...]`` one to the left, zeros at the end."""
    from nemo_automodel.components.speculative.eagle.target import Eagle3TargetBatch

    def left(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor[:, 1:], torch.zeros_like(tensor[:, :1])], 1)

    return Eagle3TargetBatch(
        aux_hidden_states=batch.hidden_states,
        logits=left(head(batch.last_hidden_states)),
        input_ids=left(batch.input_ids),
        attention_mask=batch.attention_mask,
        loss_mask=left(batch.loss_mask),
    )


def draft_of(target: Any, parallel: bool) -> Any:
    """A draft of one layer, as the recipe makes it of the target's config."""
    from nemo_automodel.components.speculative.eagle.draft_llama import LlamaEagle3DraftModel

    given = target.config.to_dict() | {"draft_vocab_size": target.config.vocab_size, "tie_word_embeddings": False}
    given |= {"num_hidden_layers": 1, "layer_types": ["full_attention"], "attn_implementation": "eager"}
    given |= {"parallel_drafting": parallel, "mask_token_id": 5}
    torch.manual_seed(1)
    draft = LlamaEagle3DraftModel(type(target.config).from_dict(given)).float()
    draft.copy_embeddings_from_target(target.get_input_embeddings())
    return awake(draft)


def vocabulary(target: Any) -> dict[str, torch.Tensor]:
    """All tokens of the target."""
    size = target.config.vocab_size
    return {"selected_token_ids": torch.arange(size), "selected_token_mask": torch.ones(size, dtype=torch.bool)}


@torch.no_grad()
def loss_of(trainer: Any, batch: Any) -> float:
    """A training loss, with the samples that seed 0 draws; without gradients, which flex attention has not on a CPU."""
    torch.manual_seed(0)
    return float(trainer(**batch.to_trainer_inputs()).loss)
