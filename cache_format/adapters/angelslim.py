"""AngelSlim's offline trainers (commit 67394ce): DFlash and EAGLE-3, from a cache.

Matched: ``angelslim/compressor/speculative/train/data/dataset_builder/offline_dataset_builder.py``. A
captured last decoder layer is given after the final norm, as its target model gives it (``models/target/
target_model_wrapper.py``).
"""

from __future__ import annotations

from typing import Any

import torch

from cache_format.adapters.records import Records
from cache_format.batch import DFlashTargetBatch
from cache_format.export.interface import require_last_hidden_states, states_of_last_layer_normed
from cache_format.reading.feature_cache import FeatureCache


def dataset(cache: FeatureCache) -> Records:
    """In place of AngelSlim's ``OfflineEagle3Dataset``; its ``DataCollatorWithPadding`` takes the records.

    Raises:
        InputError: the cache has no last_hidden_states; names the option that captures them.
    """
    require_last_hidden_states(cache, "angelslim")
    return Records(cache, record)


def record(cache: FeatureCache, sample: DFlashTargetBatch) -> dict[str, Any]:
    """A record of AngelSlim's, its tensors with a batch dimension of 1."""
    return {
        "input_ids": sample.input_ids,
        "attention_mask": torch.ones_like(sample.input_ids),
        "loss_mask": sample.loss_mask,
        "hidden_states": states_of_last_layer_normed(cache, sample)[None],
        "target_hiddens": sample.last_hidden_states,
    }


def use(cache: FeatureCache) -> None:
    """AngelSlim's offline mode reads ``cache`` from now on, whatever its data path says.

    Raises:
        InputError: as :func:`dataset`.
    """
    from angelslim.compressor.speculative.train.data.dataset_builder import offline_dataset_builder

    records = dataset(cache)
    offline_dataset_builder.OfflineEagle3Dataset = lambda **options: records
