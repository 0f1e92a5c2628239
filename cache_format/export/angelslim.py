"""AngelSlim: one torch.save'd ``.ckpt`` a sample, at any depth below the folder.

Matched: github.com/Tencent/AngelSlim at commit 67394ce, ``angelslim/compressor/speculative/train/data/dataset_builder/
offline_dataset_builder.py`` (OfflineEagle3Dataset, which its DFlash and EAGLE-3 trainers read). A record is a dict, its
tensors with a batch dimension of 1:

    input_ids        [1, S]       int64
    loss_mask        [1, S]       int64, 1 on learned tokens
    hidden_states    [1, S, L*H]  stored dtype; layers in the order of target_layer_ids, a captured last decoder layer
                                  after the final norm, as its generate_dflash_data.py writes it
    target_hiddens   [1, S, H]    stored dtype: the last hidden states, after the final norm

The reader leaves out, with a warning only, a file that lacks one of them.
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
    require_last_hidden_states(cache, "angelslim")


def _files(cache: FeatureCache) -> Iterator[ExportFile]:
    return file_a_sample(cache, "data_{:09d}.ckpt", token_bytes_with_last(cache), _fill)


def _fill(cache: FeatureCache, i: int, file: BinaryIO) -> None:
    sample = cache[i]
    assert sample.last_hidden_states is not None
    write_torch(
        file,
        {
            "input_ids": sample.input_ids,
            "loss_mask": sample.loss_mask,
            "hidden_states": states_of_last_layer_normed(cache, sample)[None],
            "target_hiddens": sample.last_hidden_states,
        },
    )


def _settings(cache: FeatureCache) -> list[str]:
    return [
        "training mode offline, train data path = OUT",
        f"draft config: dflash_config.target_layer_ids = {cache.target_layer_ids}",
    ]


ANGELSLIM = Layout(
    name="angelslim",
    reader="AngelSlim 67394ce, OfflineEagle3Dataset",
    check=_check,
    files=_files,
    settings=_settings,
)
