"""speculators."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from cache_format import FeatureCache
from peer_checks.common import LAYERS, awake, exported, late, online, same_records, target_of, told

DRAFT = {
    "loss_implementation": "eager",
    "loss_fn": "kl_div",
    "target_layer_ids": [layer + 1 for layer in LAYERS],
    "mask_token_id": 5,
    "block_size": 4,
    "max_anchors": 16,
    "num_depths": 4,
    "ttt_steps": 2,
    "ttt_step_loss_decay": 0.8,
    "norm_before_residual": True,
    "markov_rank": 8,
    "selector_rank": 8,
    "conv_group_size": 8,
}
"""Options of its train command; ``eager``, for its fused losses are kernels for GPUs."""
STATES = ("hidden_states", "verifier_last_hidden_states")


def speculators(work: Path) -> None:
    """Records of its validation split, a collated, packed batch, and the losses of its drafts."""
    from speculators.train.data import ArrowDataset, CollateFn
    from speculators.train.vocab_mapping import build_vocab_mappings_from_distribution

    from cache_format.adapters.speculators import CacheDataset, seen_by_draft
    from cache_format.export.vocab_map import vocab_map

    folder = exported(work, "speculators")
    options = {"max_len": 512, "train_ratio": 0.75, "split": "val", "hidden_states_dtype": torch.float32}
    theirs = ArrowDataset(datapath=folder, on_missing="raise", **options)
    ours = CacheDataset(seen_by_draft(FeatureCache.open(work / "cache"), LAYERS), **options)
    same_records("speculators", ours, theirs)
    assert list(ours.approx_lengths) == list(theirs.approx_lengths)
    packed = [CollateFn(512, 64, 3, torch.float32)([d[i] for i in range(4)]) for d in (ours, theirs)]
    assert all(torch.equal(packed[0][k], packed[1][k]) for k in packed[0] if torch.is_tensor(packed[0][k]))
    counts = FeatureCache.open(work / "cache").learned_counts()
    seen = {token: int(count) for token, count in enumerate(counts) if count}
    for size in (100, 1500):
        d2t, t2d = build_vocab_mappings_from_distribution(seen, size, len(counts))
        found = vocab_map(counts, size)
        assert d2t.tolist() == found.d2t.tolist()
        assert t2d.tolist() == found.t2d.tolist()
    print("speculators: vocab-map chooses the tokens that it chooses")
    losses_of_drafts(work)


def losses_of_drafts(work: Path) -> None:
    """Its drafts, made as its train command makes them, on packed batches of its collator."""
    from speculators.model import SpeculatorModel
    from speculators.models.eagle3.data import shift_batch
    from speculators.train.cli import create_transformer_layer_config
    from speculators.train.data import CollateFn

    from cache_format.adapters.speculators import CacheDataset, seen_by_draft

    target, path = target_of(work), str(work / "tiny")
    seen = seen_by_draft(FeatureCache.open(work / "cache"), LAYERS)
    records = CacheDataset(seen, 512, hidden_states_dtype=torch.float32)
    options = {**DRAFT, "verifier_name_or_path": path, "draft_vocab_size": target.config.vocab_size}
    for name in ("dflash", "dflash2", "dspark", "eagle3", "peagle"):
        torch.manual_seed(1)
        kind = SpeculatorModel.registry[name]
        config = create_transformer_layer_config(path, 1, "qwen3", None, 4096, [0])
        draft = awake(kind.from_training_args(config, **options))
        loss = partial(loss_of, draft, **kind.get_trainer_kwargs(**options)[0])
        shifted = shift_batch if name in ("eagle3", "peagle") else None
        collate, losses = CollateFn(512, 64, len(LAYERS), torch.float32, shifted), []
        for i in range(0, len(records), 4):
            here = [records[row] for row in range(i, i + 4)]
            logits = draft.verifier_lm_head(draft.verifier_norm(here[0]["verifier_last_hidden_states"]))
            torch.testing.assert_close(logits, target(here[0]["input_ids"][None]).logits[0])
            there = [online_record(target, record) for record in here]
            batches = collate(here), collate(there)
            wrong = [{**batches[1], name: late(batches[1][name])} for name in STATES]
            losses.append(tuple(loss(**batch) for batch in (*batches, *wrong)))
        told(f"speculators {name}", losses)


def online_record(target: Any, record: dict[str, Any]) -> dict[str, Any]:
    """``record`` with the target's states of now."""
    states, _ = online(target, record["input_ids"][None], [*LAYERS, 5])
    width = target.config.hidden_size
    return {**record, **dict(zip(STATES, (states[0, :, :-width], states[0, :, -width:]), strict=True))}


@torch.no_grad()
def loss_of(draft: Any, **batch: Any) -> float:
    """A training loss, with the anchors that seed 0 draws; without gradients, which flex attention has not on a CPU."""
    torch.manual_seed(0)
    batch.pop("error_records")
    return float(draft(**batch)[1])
