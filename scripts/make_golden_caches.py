"""Tiny caches of each codec and capture, as this version writes them (tests/golden/): later ones must read them.

    python scripts/make_golden_caches.py tests/golden

Run once for a codec and kept: a folder that is there is not written again. It shows what an earlier version wrote.
"""

from __future__ import annotations

import json
import sys
from dataclasses import fields
from pathlib import Path

import torch
import xxhash
from synthetic_cache import write_cache

from cache_format import FeatureCache
from cache_format.codecs.dtypes import torch_dtype
from cache_format.layout.captures import Captures

LENGTHS = [5, 31, 12, 1, 17, 9, 26, 8]
HIDDEN, LAYER_IDS = 16, [0, 2, 3]


def read_alike(cache: FeatureCache) -> str:
    """Digest of all that a trainer reads from ``cache``."""
    hasher = xxhash.xxh3_128()
    for i in range(len(cache)):
        sample = cache[i]
        for tensor in (getattr(sample, field.name) for field in fields(sample)):
            if tensor is not None:
                hasher.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    for module in (cache.get_input_embeddings(), cache.get_output_embeddings()):
        hasher.update(module.weight.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()


def states(sample_id: int, num_tokens: int, dtype: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sample_id)
    return torch.randn(num_tokens, HIDDEN * len(LAYER_IDS), generator=generator).to(torch_dtype(dtype))


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(exist_ok=True)
    codecs = ("raw", "fp8", "zbits", "quant")
    kinds = [(codec, dtype, Captures()) for codec in codecs for dtype in ("float32", "bfloat16")]
    kinds += [("raw", "bfloat16", one) for one in (Captures(last_hidden_states=True), Captures(logits_topk=4))]
    kinds += [("zbits", "float32", Captures(last_hidden_states=True, logits_topk=4))]
    # The first caches of these codecs were made before shards counted their tokens by SNR.
    kinds += [(codec, "bfloat16", Captures(last_hidden_states=True)) for codec in ("fp8", "quant")]
    for codec, dtype, capture in kinds:
        captured = "".join(f"-{name}" for name, value in capture.to_dict().items() if value)
        cache = folder / f"{codec}-{dtype}{captured}"
        if not cache.exists():
            write_cache(
                cache,
                LENGTHS,
                dtype=dtype,
                hidden=HIDDEN,
                target_layer_ids=LAYER_IDS,
                shard_bytes=64 << 10,
                states=lambda sample_id, num_tokens, dtype=dtype: states(sample_id, num_tokens, dtype),
                codec=codec,
                capture=capture,
            )
            digest = {"reads": read_alike(FeatureCache.open(cache, verify="sample"))}
            (folder / f"{cache.name}.json").write_text(json.dumps(digest) + "\n")


if __name__ == "__main__":
    main()
