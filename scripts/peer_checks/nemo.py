"""NeMo AutoModel."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cache_format import FeatureCache
from peer_checks.common import awake, late, target_of, told

LAYERS = [1, 3, 5]
"""The target's last layer among them: before the norm for DFlash and its kin, after it for DSpark."""


def loss_of(recipe: Any, batch: Any) -> float:
    """A training loss, with the anchors that seed 0 draws."""
    torch.manual_seed(0)
    return float(recipe._run_trainer_step(batch).loss.detach())


def config_of(work: Path, out: str, **own: Any) -> dict[str, Any]:
    """The YAML of a recipe that writes to ``out``; ``own`` are further recipe_args."""
    args = {
        "target_model_name_or_path": str(work / "tiny"),
        "target_layer_ids": LAYERS,
        "train_data_path": "unused",
        "output_dir": str(work / out),
        "micro_batch_size": 2,
        "seq_length": 128,
        "num_epochs": 1,
        "mask_token_id": 5,
        "block_size": 4,
        "num_anchors": 8,
        "draft_num_hidden_layers": 1,
        "attention_backend": "sdpa",
        "ckpt_every_steps": 5,
        "log_every_steps": 1,
    }
    return {
        "dist_env": {"backend": "gloo"},
        "recipe_args": {**args, **own},
        "optimizer": {"lr": 1e-3},
        "checkpoint": {"enabled": True, "checkpoint_dir": str(work / out), "save_consolidated": False},
    }


def nemo(work: Path) -> None:
    """DFlash and JetSpec: the recipe from the cache, a validation, a resume in mid-epoch, and its losses online."""
    from nemo_automodel.components.config.loader import ConfigNode
    from nemo_automodel.components.speculative.dflash.target import HFDFlashTargetModel
    from nemo_automodel.recipes.llm.train_dflash import TrainDFlashRecipe
    from nemo_automodel.recipes.llm.train_dflash2 import TrainDFlash2Recipe
    from nemo_automodel.recipes.llm.train_domino import TrainDominoRecipe
    from nemo_automodel.recipes.llm.train_jetspec import TrainJetSpecRecipe

    from cache_format.adapters.nemo import from_cache

    cache, target = FeatureCache.open(work / "cache"), target_of(work)

    def recipe(kind: Any, out: str, epochs: int, packed: int = 0, **options: Any) -> Any:
        own = {"num_epochs": epochs, "packed_sequence_size": packed}
        made = from_cache(kind, cache, **options)(ConfigNode(config_of(work, out, **own)))
        torch.manual_seed(1)
        made.setup()
        return made

    for kind, options in (
        (TrainDFlashRecipe, {"validation": 0.25}),
        (TrainDFlashRecipe, {"packed": 160}),
        (TrainDFlash2Recipe, {}),
        (TrainDominoRecipe, {}),
        (TrainJetSpecRecipe, {"logits": True}),
    ):
        name = kind.__name__.removeprefix("Train").removesuffix("Recipe") + (" packed" if "packed" in options else "")
        made, losses = recipe(kind, name, 1, **options), []
        awake(made.draft_model)
        loss = partial(loss_of, made)
        wrapper = HFDFlashTargetModel(target, LAYERS, capture_logits="logits" in options)
        for tokens in made.train_dataloader:
            batches = made.target_wrapper.generate_batch(**tokens), wrapper.generate_batch(**tokens)
            kinds = ["hidden_states"] + ["logits"] * ("logits" in options)
            wrong = [replace(batches[1], **{kind: late(getattr(batches[1], kind))}) for kind in kinds]
            losses.append(tuple(map(loss, (*batches, *wrong))))
        told(f"NeMo {name}", losses[:12])
    made = recipe(TrainDFlashRecipe, "resumed", 1, validation=0.25)
    whole = len(made.train_dataloader)
    seen: list[list[int]] = []
    step, made._run_trainer_step = made._run_trainer_step, lambda b: seen.append(b.input_ids[:, 3].tolist()) or step(b)
    save = made._maybe_save_step_checkpoint

    def stop(epoch: int) -> bool:
        if save(epoch):
            raise KeyboardInterrupt
        return False

    made._maybe_save_step_checkpoint = stop
    with suppress(KeyboardInterrupt):
        made.run_train_validation_loop()
    again = recipe(TrainDFlashRecipe, "resumed", 1, validation=0.25)
    assert len(again.train_dataloader) == whole - 5, (len(again.train_dataloader), whole)
    step_again = again._run_trainer_step
    again._run_trainer_step = lambda b: (
        (again.trainer_module.training and seen.append(b.input_ids[:, 3].tolist())) or (step_again(b))
    )
    again.run_train_validation_loop()
    straight = [
        b.input_ids[:, 3].tolist() for b in recipe(TrainDFlashRecipe, "x", 1, validation=0.25).train_dataloader.sampler
    ]
    assert seen == straight, (len(seen), len(straight))
    assert set(again._run_eval()) >= {"val_loss"}
    print(f"NeMo DFlash: stopped after 5 of {whole} steps and resumed there; validated on samples of its own")
