"""NVIDIA Model Optimizer's drafts (nvidia-modelopt 0.47.0) from a cache: what its offline dataset gives.

Matched: ``modelopt/torch/speculative/eagle/utils.py`` (OfflineSupervisedDataset; EagleOfflineDataCollator takes the
records). A captured last decoder layer is given after the final norm, as its online path takes it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from cache_format.adapters.records import Records
from cache_format.batch import DFlashTargetBatch
from cache_format.export.interface import require_last_hidden_states, states_of_last_layer_normed
from cache_format.reading.feature_cache import FeatureCache

IGNORED = -100
"""Label of the last token, which nothing follows."""


def dataset(cache: FeatureCache, *, answer_only_loss: bool = True) -> Records:
    """In place of ``OfflineSupervisedDataset``: the ``train_dataset`` of a Trainer, with EagleOfflineDataCollator.

    Args:
        cache: with last_hidden_states; layers and dtype are those of ``cache.view(...)``.
        answer_only_loss: False: every token is learned, whatever the masks say.

    Raises:
        InputError: it has no last_hidden_states; names the option that captures them.
    """
    require_last_hidden_states(cache, "modelopt")
    return Records(cache, partial(record, answer_only_loss=answer_only_loss))


def record(cache: FeatureCache, sample: DFlashTargetBatch, answer_only_loss: bool = True) -> dict[str, Any]:
    """A record of Model Optimizer's: tensors ``[S]`` and ``[S, ...]``."""
    assert sample.last_hidden_states is not None
    ids = sample.input_ids[0]
    return {
        "input_ids": ids,
        "base_model_hidden_states": sample.last_hidden_states[0],
        "aux_hidden_states": states_of_last_layer_normed(cache, sample),
        "attention_mask": torch.ones_like(ids),
        "loss_mask": sample.loss_mask[0] if answer_only_loss else torch.ones_like(ids),
        "labels": torch.cat([ids[1:], torch.full_like(ids[:1], IGNORED)]),
        "base_hidden_prenorm": False,
    }
