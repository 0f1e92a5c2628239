"""NVIDIA Model Optimizer: one torch.save'd ``.pt`` a sample, at any depth below the folder.

Matched: nvidia-modelopt 0.47.0 (PyPI), ``modelopt/torch/speculative/eagle/utils.py`` (OfflineSupervisedDataset, which
loads with weights_only=True) as ``examples/speculative_decoding`` uses it for DFlash. A record is a dict:

    input_ids              [S]       int64
    loss_mask              [S]       int64; used with answer_only_loss, else every token is learned
    hidden_states          [S, H]    stored dtype: the last hidden states, after the final norm
    aux_hidden_states      [S, L*H]  stored dtype; layers in the order of target_layer_ids
    hidden_states_prenorm  False     so that the trainer does not apply the norm again

A captured last decoder layer is given after the norm, as the project's online path takes it (transformers'
``hidden_states[layer + 1]``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from cache_format.export.interface import (
    ExportFile,
    Layout,
    file_a_sample,
    require_last_hidden_states,
    states_of_last_layer_normed,
    token_bytes_with_last,
    write_torch,
)
from cache_format.reading.feature_cache import FeatureCache


def _check(cache: FeatureCache) -> None:
    require_last_hidden_states(cache, "modelopt")


def _files(cache: FeatureCache) -> Iterator[ExportFile]:
    return file_a_sample(cache, "sample_{:09d}.pt", token_bytes_with_last(cache), _fill)


def _fill(cache: FeatureCache, i: int, file: BinaryIO) -> None:
    sample = cache[i]
    assert sample.last_hidden_states is not None
    write_torch(
        file,
        {
            "input_ids": sample.input_ids[0],
            "loss_mask": sample.loss_mask[0],
            "hidden_states": sample.last_hidden_states[0],
            "aux_hidden_states": states_of_last_layer_normed(cache, sample),
            "hidden_states_prenorm": False,
        },
    )


def _settings(cache: FeatureCache) -> list[str]:
    return [
        "data.offline_data_path = OUT",
        "training.answer_only_loss = true, or the loss masks are not used",
        f"dflash.dflash_architecture_config.target_layer_ids = {cache.target_layer_ids}",
        f"training.training_seq_len at least {max(cache.index.num_tokens, default=0)}, or samples are cut",
    ]


MODELOPT = Layout(
    name="modelopt",
    reader="nvidia-modelopt 0.47.0, OfflineSupervisedDataset",
    check=_check,
    files=_files,
    settings=_settings,
)
