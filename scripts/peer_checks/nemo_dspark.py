"""NeMo AutoModel's DSpark, from its own offline reader of an export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cache_format import FeatureCache
from peer_checks.common import awake, late, target_of, told
from peer_checks.nemo import LAYERS, config_of

STATES = ("target_hidden_states", "target_last_hidden_states")


def nemo_dspark(work: Path) -> None:
    """Its recipe on an export, and the same step on batches of its own target wrapper."""
    from nemo_automodel.components.config.loader import ConfigNode
    from nemo_automodel.components.speculative.dspark.target import HFDSparkTargetModel
    from nemo_automodel.recipes.llm.train_dspark import TrainDSparkRecipe

    from cache_format.export import LAYOUTS, export

    out, cache = work / "export-nemo-dspark", FeatureCache.open(work / "cache", verify="sample")
    export(cache.view(layers=LAYERS), LAYOUTS["nemo-dspark"], out)
    own = {"attention_backend": "flex_attention", "markov_rank": 8}
    own |= {"cached_target_path": str(out), "seq_length": int(cache.index.num_tokens.max())}
    recipe = TrainDSparkRecipe(ConfigNode(config_of(work, "nemo-dspark", mask_generation_prompt=True, **own)))
    torch.manual_seed(1)
    recipe.setup()
    awake(recipe.draft_model)
    wrapper, losses = HFDSparkTargetModel(target_of(work), LAYERS), []
    for here in recipe.train_dataloader:
        # The layout has no attention mask; the pad token, 0, is in no sample.
        now = wrapper.generate_batch(here["input_ids"], (here["input_ids"] != 0).long(), here["loss_mask"])
        there = {**here, **{kind: getattr(now, kind) for kind in STATES}}
        wrong = [{**there, kind: late(there[kind])} for kind in STATES]
        losses.append(tuple(loss_of(recipe, batch) for batch in (here, there, *wrong)))
    told("NeMo DSpark", losses)


@torch.no_grad()
def loss_of(recipe: Any, batch: dict[str, torch.Tensor]) -> float:
    """A training loss, with the anchors that seed 0 draws; without gradients, which flex attention has not on a CPU."""
    torch.manual_seed(0)
    return float(recipe._forward_batch(batch).loss)
