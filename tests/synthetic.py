"""Small caches made without a target, with states that a test can tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import synthetic_cache
import torch
from synthetic_cache import VOCAB, random_samples

from cache_format.codecs.dtypes import torch_dtype
from cache_format.layout.samples import Sample

__all__ = ["HIDDEN", "LAYER_IDS", "VOCAB", "random_samples", "states_of", "write_cache"]

HIDDEN, LAYER_IDS = 16, [0, 2, 3]


def states_of(sample_id: int, num_tokens: int, dtype: str, width: int) -> torch.Tensor:
    """The hidden states ``[num_tokens, width]`` that a synthetic cache holds for a sample."""
    generator = torch.Generator().manual_seed(sample_id)
    return torch.randn(num_tokens, width, generator=generator).to(torch_dtype(dtype))


def write_cache(
    cache: Path, lengths: list[int], *, dtype: str = "float32", hidden: int = HIDDEN, **options: Any
) -> list[Sample]:
    """A cache of samples of ``lengths`` tokens, in small shards; options as for ``synthetic_cache.write_cache``."""
    width = hidden * len(LAYER_IDS)
    return synthetic_cache.write_cache(
        cache,
        lengths,
        dtype=dtype,
        hidden=hidden,
        target_layer_ids=LAYER_IDS,
        states=lambda sample_id, num_tokens: states_of(sample_id, num_tokens, dtype, width),
        **{"shard_bytes": 64 << 10, **options},
    )
