"""What the recipes train: the small draft of scripts/dflash_draft.py, from the fields of a batch to its loss."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dflash_draft import Draft, DraftConfig, block_loss, sample_anchors

from cache_format import DFlashTargetBatch, FeatureCache

FIELDS = ("hidden_states", "input_ids", "attention_mask", "loss_mask")


class DraftWithLoss(nn.Module):
    """Put your own here."""

    def __init__(self, cache: FeatureCache):
        super().__init__()
        sizes = {"hidden_size": cache.hidden_size, "target_layer_ids": tuple(cache.target_layer_ids), "num_heads": 2}
        config = DraftConfig(**sizes, mask_token_id=0, num_layers=1, block_size=4)
        torch.manual_seed(0)
        self.draft = Draft(config)
        # The target's, frozen: in a list, so that they are no parameters and in no checkpoint.
        self.frozen = [cache.get_input_embeddings(), cache.get_output_embeddings()]

    def forward(
        self, hidden_states: Tensor, input_ids: Tensor, attention_mask: Tensor, loss_mask: Tensor
    ) -> dict[str, Tensor]:
        """``{"loss": ...}`` of 4 blocks a sample, whose places follow from the tokens: the same in every run."""
        embed, head = (module.to(input_ids.device) for module in self.frozen)
        batch = DFlashTargetBatch(hidden_states, input_ids, attention_mask, loss_mask)
        anchors, keep = sample_anchors(loss_mask, 4, torch.Generator().manual_seed(int(input_ids.sum())))
        return {"loss": block_loss(self.draft, embed, head, batch, anchors, keep, 4.0)[0]}


def fields(batch: DFlashTargetBatch) -> dict[str, Tensor]:
    """Of a batch, what the draft takes."""
    return {name: getattr(batch, name) for name in FIELDS}


def log(out: str, step: int, loss: Tensor) -> None:
    """A line of OUT/losses.jsonl."""
    Path(out).mkdir(parents=True, exist_ok=True)
    with open(Path(out) / "losses.jsonl", "a") as file:
        file.write(json.dumps([step, float(loss.detach())]) + "\n")
