"""verify --recompute: run the target again on some samples and compare - do these states belong to these tokens?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cache_format.codecs import codec_named
from cache_format.errors import InputError
from cache_format.layout.manifest import require_same_identity
from cache_format.layout.shard_layout import shard_name
from cache_format.reading.feature_cache import FeatureCache
from cache_format.upkeep.verify import Problem
from extractor.target.backend import TargetBackend
from extractor.target.load_backend import load_backend_of
from extractor.target.load_target import load_config, resolve_device
from extractor.target.target_identity import TargetIdentity, identify_target

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference, as a share of a layer's RMS in the sample, that passes as rounding: a sample is run alone here
and was run in a batch (and perhaps on another device) before. States of other tokens differ by about 1."""


@dataclass(frozen=True, kw_only=True)
class RecomputeReport:
    """What recomputing found."""

    samples: int
    largest_error: float
    """relative to a layer's RMS; see TOLERANCE"""
    tolerance: float
    problems: list[Problem]


def recompute(
    cache: Path | str,
    target_name: str,
    count: int,
    *,
    device: str,
    trust_remote_code: bool,
    adapter: Path | None = None,
) -> RecomputeReport:
    """Recompute ``count`` random samples (the same ones each time) with the target, one by one.

    Raises:
        InputError: the target cannot be loaded, or ``count`` is not positive.
        MismatchError: it is not the target that the cache was made with; names what differs.
        CacheError: the cache cannot be read.
    """
    if count < 1:
        raise InputError(f"--recompute {count}: must be at least 1")
    opened = FeatureCache.open(cache, allow_incomplete=True)
    manifest = opened.manifest
    config = load_config(target_name, None, trust_remote_code)
    target = identify_target(target_name, None, config, adapter=adapter, trust_remote_code=trust_remote_code)
    _require_same_target(opened, target)
    on = resolve_device(device)
    backend = load_backend_of(manifest, target_name, on, trust_remote_code=trust_remote_code, adapter=adapter)
    target.require_unchanged()
    chosen = np.random.RandomState(0).permutation(len(opened))[:count]
    # Rounding and the codec's error are independent; neither makes up for the other.
    tolerance = TOLERANCE[manifest.torch_dtype] + codec_named(manifest.codec["name"]).relative_error
    largest, problems = 0.0, []
    for i in chosen.tolist():
        error, layer = _largest_error(opened, i, backend, on)
        largest = max(largest, error)
        if not error <= tolerance:
            number, sample = int(opened.index.shard[i]), int(opened.index.sample_id[i])
            why = f"layer {layer} is not what the target gives for these tokens: off by {error:.2g} of its RMS"
            name = shard_name(number)
            problems.append(Problem(file=name, shard=number, sample=sample, field="hidden_states", problem=why))
    return RecomputeReport(samples=len(chosen), largest_error=largest, tolerance=tolerance, problems=problems)


def _require_same_target(cache: FeatureCache, target: TargetIdentity) -> None:
    """Compare what the cache says of its target; caches of earlier versions say nothing of code and adapters."""
    stored = {name: value for name, value in cache.manifest.identity.items() if name.startswith("target.")}
    found = {f"target.{name}": value for name, value in target.fields.items()}
    known = {name: value for name, value in found.items() if name in stored or name == "target.adapter"}
    require_same_identity(cache.where, stored, known)


def _largest_error(cache: FeatureCache, i: int, backend: TargetBackend, device: torch.device) -> tuple[float, int]:
    """RMS of the difference over RMS, at the layer where it is largest, and that layer's id."""
    sample, layer_ids = cache[i], cache.target_layer_ids
    again = torch.empty(sample.hidden_states.shape[1:], dtype=sample.hidden_states.dtype, device=device)
    backend.forward(sample.input_ids.to(device), [len(again)], again)
    stored = sample.hidden_states[0].float().view(len(again), len(layer_ids), -1)
    difference = again.cpu().float().view_as(stored) - stored
    errors = difference.square().mean((0, 2)).sqrt() / stored.square().mean((0, 2)).sqrt()
    worst = int(errors.nan_to_num(float("inf")).argmax())
    return float(errors[worst]), layer_ids[worst]
