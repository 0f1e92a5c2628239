"""verify --recompute: run the target again on some samples and compare - do these states belong to these tokens?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cache_format.codecs import Codec, codec_from_dict, codec_named
from cache_format.errors import InputError
from cache_format.layout.captures import LAST_HIDDEN_STATES
from cache_format.layout.manifest import CODEC_BEFORE, Manifest, require_same_identity
from cache_format.layout.shard_layout import shard_name
from cache_format.reading.feature_cache import FeatureCache
from cache_format.upkeep.problem import Problem
from extractor.target.backend import TargetBackend
from extractor.target.load_backend import load_backend_of
from extractor.target.load_target import load_config, resolve_device
from extractor.target.target_identity import TargetIdentity, identify_target


@dataclass(frozen=True, kw_only=True)
class Errors:
    """The norm of the difference over the norm of a token's state in a layer: the worst token's, and of the others.

    Never over a sample: first tokens carry up to 99 % of a layer's energy, and would hide that all others are wrong.
    """

    worst: float
    p99: float
    median: float

    @staticmethod
    def of(errors: np.ndarray) -> Errors:
        """Of tokens; a value that is not finite counts as infinite."""
        finite = np.nan_to_num(errors.astype(np.float64), nan=np.inf)
        # The lower neighbour: among few tokens the worst one is not the 99th percentile, too.
        p99, median = np.quantile(finite, (0.99, 0.5), method="lower")
        return Errors(worst=float(finite.max()), p99=float(p99), median=float(median))

    def beyond(self, tolerance: Errors) -> list[str]:
        """Which of the three are more than ``tolerance`` allows."""
        return [name for name, value in vars(self).items() if not value <= getattr(tolerance, name)]


TOLERANCE = {
    torch.float32: Errors(worst=1e-3, p99=3e-4, median=1e-4),
    torch.float16: Errors(worst=5e-2, p99=2e-2, median=1e-2),
    torch.bfloat16: Errors(worst=2.5e-1, p99=1e-1, median=5e-2),
}
"""What passes as rounding: a sample is run alone here and was run in a batch, perhaps on another device, before.
Measured on SmolLM2-135M (CPU, layers 1 to 27, 1,040 tokens): worst 1.1e-6, 3.7e-3 and 1.9e-2, 99th percentile at most
7.5e-7, 1.6e-3 and 1.3e-2. States of another token are off by 0.9 in the median, zeros by 1."""


@dataclass(frozen=True, kw_only=True)
class RecomputeReport:
    """What recomputing found."""

    samples: int
    tokens: int
    largest_error: float
    """of any token in any layer; see Errors"""
    layers: dict[int, Errors]
    """layer id -> errors over the tokens of all samples"""
    last_hidden_states: Errors | None = None
    """the same of these, where the cache and the backend have them"""
    tolerance: Errors
    problems: list[Problem]


def recompute(
    cache: Path | str,
    target_name: str,
    count: int,
    *,
    device: str,
    trust_remote_code: bool,
    adapter: Path | None = None,
    backend: str | None = None,
) -> RecomputeReport:
    """Recompute ``count`` random samples (the same ones each time) with the target, one by one.

    ``backend``: that computes them; None: the one that the cache was made with.

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
    chosen = np.random.RandomState(0).permutation(len(opened))[:count]
    loaded = load_backend_of(
        manifest,
        target_name,
        on,
        backend=backend,
        longest=int(opened.index.num_tokens[chosen].max()),
        trust_remote_code=trust_remote_code,
        adapter=adapter,
    )
    on = loaded.rows_device(on)
    target.require_unchanged()
    return recompute_with(opened, loaded, on, chosen)


def recompute_with(
    cache: FeatureCache, backend: TargetBackend, device: torch.device, chosen: np.ndarray
) -> RecomputeReport:
    """Recompute samples ``chosen`` of ``cache``, int ``[n]``, with a target that is loaded; ``device``: of its rows.

    last_hidden_states are compared too, where the cache and the backend have them.

    Raises:
        CacheError: the cache cannot be read.
    """
    tolerance = tolerance_of(cache.manifest)
    by_token: list[np.ndarray] = []
    problems: list[Problem] = []
    names = [f"layer {layer}" for layer in cache.target_layer_ids]
    names += [LAST_HIDDEN_STATES] if backend.captures.last_hidden_states else []
    for i in chosen.tolist():
        errors = token_errors(cache, i, backend, device)
        by_token.append(errors)
        problems += _problems(cache, i, dict(zip(names, errors.T, strict=True)), tolerance)
    together = np.concatenate(by_token)
    found = [Errors.of(errors) for errors in together.T]
    return RecomputeReport(
        samples=len(chosen),
        tokens=len(together),
        largest_error=max(errors.worst for errors in found),
        layers=dict(zip(cache.target_layer_ids, found, strict=False)),
        last_hidden_states=found[-1] if LAST_HIDDEN_STATES in names else None,
        tolerance=tolerance,
        problems=problems,
    )


def tolerance_of(manifest: Manifest) -> Errors:
    """Rounding and the codec's error are independent; neither makes up for the other; the codec before, too."""
    codecs: list[Codec] = [codec_from_dict(manifest.codec)]
    if CODEC_BEFORE in manifest.identity:
        codecs.append(codec_named(manifest.identity[CODEC_BEFORE]))
    rounding = TOLERANCE[manifest.torch_dtype]
    worst, usual = (sum(found) for found in zip(*((c.relative_error, c.usual_error) for c in codecs), strict=True))
    return Errors(worst=rounding.worst + worst, p99=rounding.p99 + worst, median=rounding.median + usual)


def token_errors(cache: FeatureCache, i: int, backend: TargetBackend, device: torch.device) -> np.ndarray:
    """float32 ``[S, L]``: of each token of sample ``i`` in each layer, what is stored against what the target gives.
    A column more where the backend captures last_hidden_states, as the cache then does."""
    sample, layers = cache[i], len(cache.target_layer_ids)
    again = torch.empty(sample.hidden_states.shape[1:], dtype=sample.hidden_states.dtype, device=device)
    _, extra = backend.row_memory(len(again), device)
    backend.forward(sample.input_ids.to(device), [len(again)], again, extra)
    stored = sample.hidden_states[0].float().view(len(again), layers, -1)
    right = again.cpu().float().view_as(stored)
    if LAST_HIDDEN_STATES in extra:
        assert sample.last_hidden_states is not None
        stored = torch.cat([stored, sample.last_hidden_states[0].float()[:, None]], dim=1)
        right = torch.cat([right, extra[LAST_HIDDEN_STATES].cpu().float()[:, None]], dim=1)
    errors: np.ndarray = ((right - stored).norm(dim=-1) / right.norm(dim=-1).clamp_min(1e-20)).numpy()
    return errors


def _problems(cache: FeatureCache, i: int, errors: dict[str, np.ndarray], tolerance: Errors) -> Iterator[Problem]:
    """A line for each layer of sample ``i`` that is off, with its worst token; ``errors``: by the layer's name."""
    number, sample = int(cache.index.shard[i]), int(cache.index.sample_id[i])
    for layer, of_layer in errors.items():
        found = Errors.of(of_layer)
        if beyond := found.beyond(tolerance):
            told = (f"{name} {getattr(found, name):.2g} (at most {getattr(tolerance, name):.2g})" for name in beyond)
            token = int(np.nan_to_num(of_layer, nan=np.inf).argmax())
            why = (
                f"{layer} is not what the target gives for these tokens: off by {', '.join(told)} of a token's "
                f"norm, most at token {token}"
            )
            name = shard_name(number)
            yield Problem(
                file=name,
                shard=number,
                sample=sample,
                field=LAST_HIDDEN_STATES if layer == LAST_HIDDEN_STATES else "hidden_states",
                problem=why,
            )


def _require_same_target(cache: FeatureCache, target: TargetIdentity) -> None:
    """Compare what the cache says of its target; caches of earlier versions say nothing of code and adapters."""
    stored = {name: value for name, value in cache.manifest.identity.items() if name.startswith("target.")}
    found = {f"target.{name}": value for name, value in target.fields.items()}
    known = {name: value for name, value in found.items() if name in stored or name == "target.adapter"}
    require_same_identity(cache.where, stored, known)
