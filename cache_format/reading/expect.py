"""``FeatureCache.open(expect=...)``: is this the cache that the trainer relies on?"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
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
"""What ``FeatureCache.open(expect=...)`` can compare, and the fields ``target.`` of the manifest's identity."""


def check_expected(where: str, manifest: Manifest, expect: Mapping[str, Any]) -> None:
    """Compare a manifest with what a trainer expects.

    Raises:
        MismatchError: names both sides of every difference.
        InputError: a field that a cache does not have.
    """
    identity = {name: value for name, value in manifest.identity.items() if name.startswith("target.")}
    unknown = sorted(set(expect) - set(EXPECTABLE) - set(identity))
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
        **identity,
    }
    asked = {name: _plain(value) for name, value in expect.items()}
    if isinstance(asked.get("target"), Manifest):
        asked |= target_identity(asked.pop("target"))
    elif "target" in asked and _same_place(asked["target"], target.name):
        del asked["target"]
    different = {name: (have.get(name), asked[name]) for name in asked if have.get(name) != asked[name]}
    if different:
        raise MismatchError(f"{where}: this cache is not what the trainer expects. Different:", different)


def target_identity(manifest: Manifest) -> dict[str, Any]:
    """What tells a cache's target from others: digests, where the cache has them, else its name."""
    found = {name: value for name, value in manifest.identity.items() if name.startswith("target.")}
    return found if "target.weights" in found else {"target": manifest.target.name}


def _same_place(one: Any, other: str) -> bool:
    """Whether two spellings lead to the same folder."""
    try:
        return os.path.samefile(Path(one).expanduser(), Path(other).expanduser())
    except (OSError, TypeError, ValueError):
        return False


def _plain(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    value = getattr(value, "manifest", value)
    return list(value) if isinstance(value, tuple | range) else value
