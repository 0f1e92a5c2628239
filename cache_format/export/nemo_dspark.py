"""NeMo AutoModel: the DSpark offline cache, format version 1.

Matched: nemo-automodel 0.7.0 (PyPI), ``components/datasets/llm/dspark_cache.py`` (CachedDSparkDataset) and
``offline_cache.py``; read by ``recipes/llm/train_dspark.py`` (``recipe_args.cached_target_path``). NeMo's DFlash recipe
has no offline reader: use cache_format's in it (README). The folder:

    shard-000000.safetensors ...   shard_size samples each, padded with zeros to seq_length N:
                                   input_ids [n, N] int64, loss_mask [n, N] int64, target_hidden_states [n, N, L*H],
                                   target_last_hidden_states [n, N, H] (after the final norm), stored dtype
    target_weights.safetensors     embed_tokens.weight [V, H], lm_head.weight [V, H], stored dtype
    manifest.json                  format_version, complete, sizes, target_layer_ids, dtype (bf16, fp16, fp32), ...

Every sample is padded to the cache's longest, so this layout can take several times the cache's size. A captured last
decoder layer is given after the norm, as HFDSparkTargetModel does. The recipe's options have to match the manifest;
cache_format's loss masks leave out the role header of a turn, which is the recipe's ``mask_generation_prompt: true``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import partial
from typing import BinaryIO

import torch

from cache_format.codecs.dtypes import DTYPE_NAMES
from cache_format.export.interface import (
    ExportFile,
    Layout,
    require_last_hidden_states,
    safetensors_size,
    states_of_last_layer_normed,
    write_safetensors,
)
from cache_format.reading.feature_cache import FeatureCache
from cache_format.storage.commit import write_all

FORMAT_VERSION = 1
SHARD_BYTES = 256 << 20
"""Shards are about this large, but have a sample at least and ``MAX_SHARD_SAMPLES`` at most."""
MAX_SHARD_SAMPLES = 256
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def _check(cache: FeatureCache) -> None:
    require_last_hidden_states(cache, "nemo-dspark")


def _seq_length(cache: FeatureCache) -> int:
    return max(cache.index.num_tokens.tolist(), default=1)


def _entries(cache: FeatureCache, samples: int) -> list[tuple[str, str, tuple[int, ...]]]:
    dtype, shape = DTYPE_NAMES[cache.manifest.torch_dtype], (samples, _seq_length(cache))
    return [
        ("input_ids", "I64", shape),
        ("loss_mask", "I64", shape),
        ("target_hidden_states", dtype, (*shape, cache.manifest.width)),
        ("target_last_hidden_states", dtype, (*shape, cache.hidden_size)),
    ]


def _shard_size(cache: FeatureCache) -> int:
    return min(MAX_SHARD_SAMPLES, max(1, SHARD_BYTES // safetensors_size(_entries(cache, 1))))


def _files(cache: FeatureCache) -> Iterator[ExportFile]:
    target, item, step = cache.manifest.target, cache.manifest.torch_dtype.itemsize, _shard_size(cache)
    full = safetensors_size(_entries(cache, step))
    for number, start in enumerate(range(0, len(cache), step)):
        samples = range(start, min(start + step, len(cache)))
        size = full if len(samples) == step else safetensors_size(_entries(cache, len(samples)))
        name = f"shard-{number:06d}.safetensors"
        yield ExportFile(name=name, num_bytes=size, fill=partial(_fill_shard, cache, samples))
    yield ExportFile(
        name="target_weights.safetensors",
        num_bytes=2 * target.vocab_size * target.hidden_size * item,
        fill=partial(_fill_weights, cache),
    )
    manifest = json.dumps(_manifest(cache, step), indent=2, sort_keys=True).encode()
    yield ExportFile(name="manifest.json", num_bytes=len(manifest), fill=lambda file: write_all(file, manifest))


def _fill_shard(cache: FeatureCache, samples: range, file: BinaryIO) -> None:
    kinds = {"I64": torch.int64, DTYPE_NAMES[cache.manifest.torch_dtype]: cache.manifest.torch_dtype}
    shard = {name: torch.zeros(shape, dtype=kinds[dtype]) for name, dtype, shape in _entries(cache, len(samples))}
    for row, i in enumerate(samples):
        sample = cache[i]
        assert sample.last_hidden_states is not None
        length = sample.input_ids.shape[1]
        shard["input_ids"][row, :length] = sample.input_ids[0]
        shard["loss_mask"][row, :length] = sample.loss_mask[0]
        shard["target_hidden_states"][row, :length] = states_of_last_layer_normed(cache, sample)
        shard["target_last_hidden_states"][row, :length] = sample.last_hidden_states[0]
    write_safetensors(file, shard)


def _fill_weights(cache: FeatureCache, file: BinaryIO) -> None:
    embed, head = cache.get_input_embeddings().weight, cache.get_output_embeddings().weight
    dtype = cache.manifest.torch_dtype
    write_safetensors(file, {"embed_tokens.weight": embed.data.to(dtype), "lm_head.weight": head.data.to(dtype)})


def _manifest(cache: FeatureCache, shard_size: int) -> dict[str, object]:
    manifest, target = cache.manifest, cache.manifest.target
    template = cache.path / "target" / "chat_template.jinja"
    return {
        "format_version": FORMAT_VERSION,
        "complete": True,
        "target_model": target.name,
        "target_model_type": target.model_type,
        "target_vocab_size": target.vocab_size,
        "hidden_size": target.hidden_size,
        "num_hidden_layers": target.num_hidden_layers,
        "seq_length": _seq_length(cache),
        "dtype": DTYPES[manifest.torch_dtype],
        "num_samples": len(cache),
        "shard_size": shard_size,
        "target_hidden_dim": manifest.width,
        "target_last_hidden_dim": target.hidden_size,
        "target_layer_ids": cache.target_layer_ids,
        "train_data_path": manifest.data.name if manifest.data else "",
        "train_split": None,
        "shuffle_seed": 0,
        "mask_reasoning_content": False,
        "mask_generation_prompt": True,
        "chat_template_sha256": hashlib.sha256(template.read_bytes() if template.is_file() else b"").hexdigest(),
        "exported_from": manifest.fingerprint,
    }


def _settings(cache: FeatureCache) -> list[str]:
    return [
        f"recipe_args.cached_target_path = OUT, seq_length = {_seq_length(cache)}, mask_generation_prompt = true",
        f"recipe_args.target_layer_ids = {cache.target_layer_ids}",
    ]


NEMO_DSPARK = Layout(
    name="nemo-dspark",
    reader="nemo-automodel 0.7.0, CachedDSparkDataset, format version 1",
    check=_check,
    files=_files,
    settings=_settings,
)
