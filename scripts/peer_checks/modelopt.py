"""NVIDIA Model Optimizer."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cache_format import FeatureCache
from peer_checks.common import LAYERS, awake, exported, late, same_records, told

DFLASH = {
    "dflash_block_size": 4,
    "dflash_num_anchors": 8,
    "dflash_mask_token_id": 5,
    "dflash_lambda_base_start": 0.5,
    "dflash_confidence_head_alpha": 1.0,
}
"""What its DFlash, Domino and DSpark have in common here."""


def modelopt(work: Path) -> None:
    """Records, with the target's last layer among those of the draft, and the losses of its drafts."""
    from modelopt.torch.speculative.eagle.utils import OfflineSupervisedDataset

    from cache_format.adapters.modelopt import dataset

    files = sorted(map(str, exported(work, "modelopt").rglob("*.pt")))
    for only in (True, False):
        same_records(
            "Model Optimizer",
            dataset(FeatureCache.open(work / "cache"), answer_only_loss=only),
            OfflineSupervisedDataset(files, answer_only_loss=only),
        )
    losses_of_drafts(work)


def drafts() -> dict[str, tuple[str, dict[str, Any], list[int]]]:
    """Of each draft: the mode of ``modelopt.torch.speculative.convert``, its config, and the layers it sees.

    The DFlash family also sees the target's last layer, 5: normed, which the adapter has to know. EAGLE-3's hooks on
    the target take a layer's output as it is, so that it is not given that one.
    """
    from modelopt.torch.speculative.config import eagle3_default_config

    layers = [1, 3, 5]
    heads = {
        "dflash": {},
        "domino": {"projector_type": "domino", "emb_dim": 8, "gru_hidden_dim": 8},
        "dspark": {"projector_type": "dspark", "markov_rank": 8, "use_confidence_head": True},
    }
    found = {}
    for name, head in heads.items():
        shape = {"target_layer_ids": layers, "num_hidden_layers": len(layers), **head}
        found[name] = ("dflash", {**DFLASH, "dflash_architecture_config": shape}, layers)
    eagle3 = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 128}
    shape = {**eagle3_default_config, **eagle3, "eagle_aux_hidden_state_layer_ids": LAYERS}
    found["eagle3"] = ("eagle", {"eagle_architecture_config": shape}, LAYERS)
    return found


def losses_of_drafts(work: Path) -> None:
    """Its own online training, with the target inside, and its offline one, which has no layers of the target."""
    import modelopt.torch.speculative as speculative
    from modelopt.torch.speculative.eagle.utils import EagleOfflineDataCollator
    from modelopt.torch.speculative.utils import load_vlm_or_llm

    from cache_format.adapters.modelopt import dataset

    collate, path = EagleOfflineDataCollator(128), str(work / "tiny")
    for name, (mode, config, layers) in drafts().items():
        torch.manual_seed(1)
        models = {}
        for offline in (False, True):
            base = load_vlm_or_llm(path, use_offline_training=offline, dtype=torch.float32, device_map="cpu")
            options = {f"{mode}_offline": offline, **deepcopy(config)}
            models[offline] = awake(speculative.convert(base, [(mode, options)]).train())
        models[False].load_state_dict(models[True].state_dict(), strict=False)
        records, losses = dataset(FeatureCache.open(work / "cache").view(layers=layers)), []
        for i in range(0, len(records), 2):
            batch = collate([records[i], records[i + 1]])
            states = batch.pop("base_model_outputs")
            from_states = partial(loss_of, models[True], **batch)
            kinds = ["aux_hidden_states"] + ["base_model_hidden_states"] * (name != "domino")
            wrong = [from_states(base_model_outputs={**states, kind: late(states[kind])}) for kind in kinds]
            losses.append((from_states(base_model_outputs=states), loss_of(models[False], **batch), *wrong))
        told(f"Model Optimizer {name}", losses)


def loss_of(model: Any, **batch: Any) -> float:
    """A training loss, with the anchors that seed 0 draws."""
    torch.manual_seed(0)
    return float(model(**batch).loss.detach())
