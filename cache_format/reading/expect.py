"""``FeatureCache.open(expect=...)``: is this the cache that the trainer relies on?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from cache_format.errors import InputError, MismatchError
from cache_format.layout.manifest import Manifest

EXPECTABLE = (
    "target",
    "model_type",
    "target_layer_ids",
    "hidden_size",
    "num_hidden_layers",
    "vocab_size",
    "dtype",
    "codec",
    "fingerprint",
)
"""What ``FeatureCache.open(expect=...)`` can compare."""


def check_expected(where: str, manifest: Manifest, expect: Mapping[str, Any]) -> None:
    """Compare a manifest with what a trainer expects.

    Raises:
        MismatchError: names both sides of every difference.
        InputError: a field that a cache does not have.
    """
    unknown = sorted(set(expect) - set(EXPECTABLE))
    if unknown:
        raise InputError(f"expect: a cache has no field {', '.join(unknown)}; it has {', '.join(EXPECTABLE)}")
    target = manifest.target
    have = {
        "target": target.name,
        "model_type": target.model_type,
        "target_layer_ids": manifest.target_layer_ids,
        "hidden_size": target.hidden_size,
        "num_hidden_layers": target.num_hidden_layers,
        "vocab_size": target.vocab_size,
        "dtype": manifest.dtype,
        "codec": manifest.codec["name"],
        "fingerprint": manifest.fingerprint,
    }
    asked = {name: _plain(value) for name, value in expect.items()}
    different = {name: (have[name], asked[name]) for name in asked if have[name] != asked[name]}
    if different:
        raise MismatchError(f"{where}: this cache is not what the trainer expects. Different:", different)


def _plain(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return list(value) if isinstance(value, tuple | range) else value
