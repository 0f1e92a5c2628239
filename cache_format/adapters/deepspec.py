"""DeepSpec's trainers (commit afdfa7c, target cache version 2): DSpark, DFlash and EAGLE-3, from a cache.

Matched: ``deepspec/trainer/base_trainer.py`` (CacheDataset, validate_train_cache), ``deepspec/data/
target_cache_dataset.py``. States are raw, the last hidden states after the final norm; bfloat16 as its own cache.
"""

from __future__ import annotations

from typing import Any

import torch

from cache_format.adapters.records import Records
from cache_format.batch import DFlashTargetBatch
from cache_format.export.interface import require_last_hidden_states
from cache_format.reading.feature_cache import FeatureCache


class CacheRecords(Records):
    """In place of DeepSpec's ``CacheDataset``: the same records, and what its trainer looks at of the manifest."""

    def __init__(self, cache: FeatureCache):
        """
        Raises:
            InputError: it has no last_hidden_states; names the option that captures them.
        """
        require_last_hidden_states(cache, "deepspec")
        super().__init__(cache.view(dtype=torch.bfloat16), record)
        self.manifest = {
            "target_layer_ids": cache.target_layer_ids,
            "hidden_size": cache.hidden_size,
            "target_model_name_or_path": cache.manifest.target.name,
            "num_samples": len(cache),
        }


def record(cache: FeatureCache, sample: DFlashTargetBatch) -> dict[str, Any]:
    """A record of DeepSpec's: input_ids ``[S]`` int32, loss_mask ``[S]`` uint8, both states bfloat16."""
    assert sample.last_hidden_states is not None
    return {
        "input_ids": sample.input_ids[0].to(torch.int32),
        "loss_mask": sample.loss_mask[0].to(torch.uint8),
        "target_hidden_states": sample.hidden_states[0],
        "target_last_hidden_states": sample.last_hidden_states[0],
    }


def use(cache: FeatureCache) -> None:
    """DeepSpec's trainers of this process read ``cache`` from now on, whatever ``data.target_cache_path`` says.

    Raises:
        InputError: as :class:`CacheRecords`.
    """
    from deepspec.trainer import base_trainer

    records = CacheRecords(cache)
    base_trainer.CacheDataset = lambda cache_dir: records
