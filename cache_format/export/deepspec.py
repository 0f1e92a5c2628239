"""DeepSpec: its target cache, protocol version 2.

Matched: github.com/deepseek-ai/DeepSpec, ``deepspec/data/target_cache_dataset.py`` (CacheDataset) at commit 4351696.
The folder:

    shard-00000.bin ...   a sample after another, without gaps: input_ids [S] int32, attention_mask [S] uint8,
                          loss_mask [S] uint8, target_hidden_states [S, L*H] bfloat16,
                          target_last_hidden_states [S, H] bfloat16 (after the final norm)
    samples.idx           56 bytes a sample, in order, little-endian: sample_id u64, shard_id u32, seq_len u32, and the
                          offset in its shard of each of the five tensors, u64
    manifest.json         version, counts, target_layer_ids (ascending), hidden_size, dtypes, shards

A shard of the cache becomes one shard here. The layout's states are bfloat16 (DeepSpec's own writer rounds too), so
those of another dtype are rounded. Layers are concatenated in the order of target_layer_ids, which has to ascend.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from typing import BinaryIO

import numpy as np
import torch

from cache_format.errors import InputError
from cache_format.export.interface import ExportFile, Layout, require_last_hidden_states, write_tensor
from cache_format.reading.feature_cache import FeatureCache
from cache_format.storage.commit import write_all

VERSION = 2
_TENSORS = ("input_ids", "attention_mask", "loss_mask", "target_hidden_states", "target_last_hidden_states")
RECORD = np.dtype(
    [("sample_id", "<u8"), ("shard_id", "<u4"), ("seq_len", "<u4"), *((f"{name}_offset", "<u8") for name in _TENSORS)]
)
"""One row of samples.idx."""


def _check(cache: FeatureCache) -> None:
    require_last_hidden_states(cache, "deepspec")
    if cache.target_layer_ids != sorted(cache.target_layer_ids):
        raise InputError(
            f"{cache.path}: DeepSpec takes layers in ascending order, this cache has {cache.target_layer_ids}. Extract "
            f"with `--target-layers {','.join(map(str, sorted(cache.target_layer_ids)))}` into another --out"
        )


def _token_bytes(cache: FeatureCache) -> list[int]:
    """Bytes a token of each tensor, in file order."""
    return [4, 1, 1, 2 * cache.manifest.width, 2 * cache.hidden_size]


def _files(cache: FeatureCache) -> Iterator[ExportFile]:
    numbers = np.unique(cache.index.shard)
    order = np.argsort(cache.index.shard, kind="stable")
    starts = np.searchsorted(cache.index.shard[order], numbers, side="left").tolist()
    for shard, (start, stop) in enumerate(zip(starts, [*starts[1:], len(order)], strict=True)):
        samples = order[start:stop]
        size = int(cache.index.num_tokens[samples].sum(dtype=np.int64)) * sum(_token_bytes(cache))
        yield ExportFile(name=_shard_name(shard), num_bytes=size, fill=partial(_fill_shard, cache, samples))
    yield ExportFile(name="samples.idx", num_bytes=len(cache) * RECORD.itemsize, fill=partial(_fill_index, cache))
    manifest = json.dumps(_manifest(cache, len(numbers)), indent=2, sort_keys=True).encode()
    yield ExportFile(name="manifest.json", num_bytes=len(manifest), fill=lambda file: write_all(file, manifest))


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.bin"


def _fill_shard(cache: FeatureCache, samples: np.ndarray, file: BinaryIO) -> None:
    for i in samples.tolist():
        sample = cache[i]
        assert sample.last_hidden_states is not None
        write_tensor(file, sample.input_ids[0].to(torch.int32))
        write_tensor(file, sample.attention_mask[0].to(torch.uint8))
        write_tensor(file, sample.loss_mask[0].to(torch.uint8))
        write_tensor(file, sample.hidden_states[0].to(torch.bfloat16))
        write_tensor(file, sample.last_hidden_states[0].to(torch.bfloat16))


def _fill_index(cache: FeatureCache, file: BinaryIO) -> None:
    lengths = np.asarray(cache.index.num_tokens, np.int64)
    shards = np.unique(cache.index.shard, return_inverse=True)[1]
    records = np.zeros(len(cache), RECORD)
    records["sample_id"], records["shard_id"], records["seq_len"] = np.arange(len(cache)), shards, lengths
    widths = _token_bytes(cache)
    order = np.argsort(shards, kind="stable")
    ends = np.cumsum(lengths[order] * sum(widths))
    starts = ends - lengths[order] * sum(widths)
    first = np.searchsorted(shards[order], np.arange(shards.max(initial=-1) + 1))
    at = np.empty(len(cache), np.int64)
    at[order] = starts - starts[first][shards[order]]
    for name, width in zip(_TENSORS, widths, strict=True):
        records[f"{name}_offset"] = at
        at += lengths * width
    write_all(file, records.tobytes())


def _manifest(cache: FeatureCache, num_shards: int) -> dict[str, object]:
    return {
        "version": VERSION,
        "num_samples": len(cache),
        "num_shards": num_shards,
        "target_layer_ids": cache.target_layer_ids,
        "hidden_dtype": "bfloat16",
        "token_dtype": "int32",
        "mask_dtype": "uint8",
        "index_record_size": RECORD.itemsize,
        "hidden_size": cache.hidden_size,
        "shards": [{"shard_id": i, "file_name": _shard_name(i)} for i in range(num_shards)],
        "target_model_name_or_path": cache.manifest.target.name,
        "exported_from": cache.manifest.fingerprint,
    }


def _settings(cache: FeatureCache) -> list[str]:
    rounded = [] if cache.manifest.dtype == "bfloat16" else [f"states are rounded from {cache.manifest.dtype}"]
    return [
        "data.target_cache_path = OUT",
        f"model.target_layer_ids = {cache.target_layer_ids}",
        f"model.target_model_name_or_path = {cache.manifest.target.name!r}, the same text",
        *rounded,
    ]


DEEPSPEC = Layout(
    name="deepspec",
    reader="DeepSpec 4351696, CacheDataset, target cache version 2",
    check=_check,
    files=_files,
    settings=_settings,
)
