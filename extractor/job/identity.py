"""Identity: every input that can change a byte of the cache. A resume compares it, the fingerprint is its digest."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from typing import Any

from cache_format.codecs import codec_named
from cache_format.device import accelerators, name
from cache_format.layout.manifest import fingerprint
from extractor.config import ExtractOptions
from extractor.job.plan import PLAN_VERSION
from extractor.target.load_target import target_identity, tokenizer_identity
from extractor.target.tensor_parallel import world_size

PACKAGES = ("dflash-cache", "torch", "transformers", "tokenizers", "safetensors", "pyarrow", "zstandard")


def inputs_identity(
    options: ExtractOptions, *, config: Any, tokenizer: Any, target_layer_ids: list[int], dtype: str, data_digest: str
) -> dict[str, Any]:
    """Dotted field -> JSON value, as far as it is known before the target is loaded and the samples are prepared.

    Later join ``attn_implementation`` and ``padding`` (decided by the loaded target), ``batch_tokens`` where it is to
    be found out, and ``samples`` (the digest of the prepared samples, in order). Digests the target's weight files, so
    it takes as long as reading them.
    """
    target = target_identity(options.target.name, options.target.revision, config)
    return {
        **{f"target.{name}": value for name, value in target.items()},
        **tokenizer_identity(tokenizer),
        "target_layer_ids": target_layer_ids,
        "dtype": dtype,
        "codec": codec_named(options.codec).to_dict(),
        "capture": options.capture.to_dict(),
        "data.digest": data_digest,
        **_prepare_identity(options),
        "on_nonfinite": options.on_nonfinite,
        "compile": options.target.compile,
        "deterministic": options.target.deterministic,
        **({"tp_size": world_size()} if options.target.tp_plan else {}),
        "plan": PLAN_VERSION,
        **{name: value for name, value in asdict(options.plan).items() if value is not None},
    }


_OF_THE_STATES_ALONE = (
    *("target_layer_ids", "dtype", "codec", "capture", "on_nonfinite", "compile", "deterministic", "tp_size"),
    *("plan", "shard_bytes", "batch_tokens"),
)
"""Fields that decide nothing about the prepared samples, nor do those that begin with ``target.``."""


def samples_identity(identity: Mapping[str, Any]) -> str:
    """Digest of what decides the prepared samples, for each of their parts: that of any field not known to be of no
    account to them. ``identity``: of :func:`inputs_identity`."""
    decides = {k: v for k, v in identity.items() if k not in _OF_THE_STATES_ALONE and not k.startswith("target.")}
    return fingerprint(decides)


def _prepare_identity(options: ExtractOptions) -> dict[str, Any]:
    """Left out where not given, so that caches from before the option resume: ``columns``."""
    fields = asdict(options.prepare)
    columns = fields.pop("columns")
    return {**fields, **({"columns": dict(columns)} if columns else {})}


def software() -> dict[str, str]:
    """Versions and hardware of this run: they may change rounding, but a resume under others is only warned of."""
    versions = {name: metadata.version(name) for name in PACKAGES}
    found = accelerators()
    return {**versions, "python": platform.python_version(), "device": name(found[0]) if found else platform.machine()}


def other_software(created_with: dict[str, str]) -> list[str]:
    """What differs between the run that began a cache and this one, such as ``torch 2.9.0 -> 2.13.0``."""
    now = software()
    return [f"{name} {was} -> {now[name]}" for name, was in created_with.items() if now.get(name, was) != was]
