"""SpecForge: one torch.save'd ``.ckpt`` a sample, at any depth below the folder.

Matched: specforge 0.2.0 (PyPI), ``runtime/data_plane/offline_reader.py`` (OfflineManifestReader) with the feature
keys of ``algorithms/dflash`` (storage format ``specforge_hidden_states_v1``), ``algorithms/domino`` (the same) and
``algorithms/dspark``. A record is a dict:

    input_ids                   [S]       int64
    loss_mask                   [S]       int64, 1 on learned tokens
    hidden_states               [S, L*H]  stored dtype; layers in the order of target_layer_ids
    target_last_hidden_states   [S, H]    stored dtype, after the final norm: for DSpark, where the cache has them

Its normaliser refuses a sample without two adjacent learned tokens, in the middle of training; such samples are left
out here. It cuts samples at the trainer's max_length, which can leave one without them: have it at least as long as
the cache's longest sample.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from cache_format.export.interface import (
    ExportFile,
    Layout,
    LeftOut,
    file_a_sample,
    token_bytes_with_last,
    write_torch,
)
from cache_format.reading.feature_cache import FeatureCache


def _check(cache: FeatureCache) -> None:
    """Any cache will do."""


def _files(cache: FeatureCache) -> Iterator[ExportFile]:
    return file_a_sample(cache, "data_{:09d}.ckpt", token_bytes_with_last(cache), _fill)


def _fill(cache: FeatureCache, i: int, file: BinaryIO) -> None:
    sample = cache[i]
    mask = sample.loss_mask[0]
    if not (mask[:-1] & mask[1:]).any():
        raise LeftOut(f"sample {i} has no two adjacent learned tokens")
    record = {"input_ids": sample.input_ids[0], "loss_mask": mask, "hidden_states": sample.hidden_states[0]}
    if sample.last_hidden_states is not None:
        record["target_last_hidden_states"] = sample.last_hidden_states[0]
    write_torch(file, record)


def _settings(cache: FeatureCache) -> list[str]:
    return [
        f"draft config: dflash_config.target_layer_ids = {cache.target_layer_ids}",
        f"max_length at least {max(cache.index.num_tokens, default=0)}",
    ]


SPECFORGE = Layout(
    name="specforge",
    reader="specforge 0.2.0, OfflineManifestReader",
    check=_check,
    files=_files,
    settings=_settings,
)
