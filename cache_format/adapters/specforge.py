"""SpecForge's trainer (0.2.0) from a cache: any of its strategies, without its files or its feature store.

Matched: ``specforge/training/strategies/base.py`` (required_features, Eagle3's target_repr), ``controller.py`` (an
iterable with set_epoch and seek), ``algorithms/eagle3/data.py``. ``target`` and ``target_last_hidden_states`` are the
last hidden states after the final norm: the strategy puts the head on them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from cache_format.batch import DFlashTargetBatch
from cache_format.errors import InputError
from cache_format.reading.feature_cache import FeatureCache
from cache_format.reading.loader import CacheLoader

STRATEGIES = ("dflash", "domino", "dspark", "eagle3", "peagle")


class Batches:
    """``TrainerController.fit(Batches(cache.loader(...), "dflash"))``: its TrainBatch, epoch by epoch.

    ``eagle3`` wants a cache of its three layers and, as ``dspark`` and ``peagle`` (batches of 1) do, ``--capture
    last_hidden_states``. SpecForge's checkpoint counts batches, and resumes by :meth:`seek`.
    """

    def __init__(self, loader: CacheLoader, strategy: str = "dflash"):
        """
        Raises:
            InputError: no such strategy.
        """
        if strategy not in STRATEGIES:
            raise InputError(f"strategy {strategy!r}: choose one of {', '.join(STRATEGIES)}")
        self.loader, self.strategy = loader, strategy
        self.set_epoch, self.seek = loader.set_epoch, loader.skip

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        from specforge.runtime.contracts import TrainBatch

        metadata = {"target_repr": "hidden_state"} if self.strategy in ("eagle3", "peagle") else {}
        for batch in self.loader:
            tensors = features(batch, self.strategy)
            yield TrainBatch([""] * len(batch.input_ids), self.strategy, tensors, metadata)


def features(batch: DFlashTargetBatch, strategy: str) -> dict[str, Tensor]:
    """The tensors that a strategy asks for.

    Raises:
        InputError: they were not captured.
    """
    last = batch.last_hidden_states
    if strategy in ("dflash", "domino"):
        return {"input_ids": batch.input_ids, "hidden_states": batch.hidden_states, "loss_mask": batch.loss_mask}
    if last is None:
        raise InputError(f"strategy {strategy} needs the target's last hidden states: --capture last_hidden_states")
    if strategy == "dspark":
        return {**features(batch, "dflash"), "target_last_hidden_states": last}
    # Nothing follows a sample's last token: its own offline normaliser unlearns it.
    ends = torch.nn.functional.one_hot(batch.attention_mask.sum(1) - 1, batch.input_ids.shape[1])
    return {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "loss_mask": batch.loss_mask * (1 - ends),
        "hidden_state": batch.hidden_states,
        "target": last,
    }


def target_head(cache: FeatureCache) -> nn.Module:
    """The frozen head that ``Eagle3TrainStrategy(target_head=...)`` and P-EAGLE's take, from the cache itself."""
    from specforge.modeling.target.target_head import TargetHead

    class Head(TargetHead):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.fc = cache.get_output_embeddings()

    return Head()
