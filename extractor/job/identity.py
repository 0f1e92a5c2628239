"""Identity: every input that can change a byte of the cache. A resume compares it, the fingerprint is its digest."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict
from datetime import date
from importlib import metadata
from typing import Any

import torch

from cache_format.codecs import codec_named
from cache_format.device import hardware
from cache_format.errors import MismatchError
from cache_format.layout.manifest import Manifest, fingerprint
from extractor.config import ExtractOptions, PrepareOptions, TargetOptions
from extractor.data.chat_template import uses_date
from extractor.job.plan import PLAN_VERSION
from extractor.target.parallel_plan import world_size
from extractor.target.target_identity import TargetIdentity, tokenizer_identity
from extractor.terminal.progress import say

PACKAGES = ("dflash-cache", "torch", "transformers", "tokenizers", "safetensors", "pyarrow", "zstandard")
KERNELS = (
    *("accelerate", "triton", "kernels", "peft", "flash-attn", "flash-linear-attention", "causal-conv1d", "mamba-ssm"),
    *("compressed-tensors", "bitsandbytes", "fbgemm-gpu", "torchao", "gptqmodel", "optimum", "gguf", "numpy"),
)
"""What transformers computes with where it is installed."""


def inputs_identity(
    options: ExtractOptions,
    *,
    target: TargetIdentity,
    tokenizer: Any,
    target_layer_ids: list[int],
    dtype: str,
    data_digest: str,
) -> dict[str, Any]:
    """Dotted field -> JSON value, as far as it is known before the target is loaded and the samples are prepared.

    Later join what the loaded target decides (see ``LATER_IDENTITY``), ``batch_tokens`` where it is to be found out,
    and ``samples`` (the digest of the prepared samples, in order).
    """
    return {
        **{f"target.{name}": value for name, value in target.fields.items()},
        **tokenizer_identity(tokenizer),
        "target_layer_ids": target_layer_ids,
        "dtype": dtype,
        "codec": codec_named(options.codec).asked,
        "capture": options.capture.to_dict(),
        "data.digest": data_digest,
        **_prepare_identity(options),
        "on_nonfinite": options.on_nonfinite,
        "compile": options.target.compile,
        "deterministic": options.target.deterministic,
        **_division(options.target),
        "plan": PLAN_VERSION,
        **{name: value for name, value in asdict(options.plan).items() if value is not None},
    }


_OF_THE_STATES_ALONE = (
    *("target_layer_ids", "dtype", "codec", "capture", "on_nonfinite", "compile", "deterministic", "tp_size"),
    *("plan", "shard_bytes", "batch_tokens", "backend", "tensor_parallel", "pipeline_parallel", "expert_parallel"),
)
"""Fields that decide nothing about the prepared samples, nor do those that begin with ``target.``."""


def samples_identity(identity: Mapping[str, Any]) -> str:
    """Digest of what decides the prepared samples, for each of their parts: that of any field not known to be of no
    account to them. ``identity``: of :func:`inputs_identity`."""
    decides = {k: v for k, v in identity.items() if k not in _OF_THE_STATES_ALONE and not k.startswith("target.")}
    return fingerprint(decides)


def _prepare_identity(options: ExtractOptions) -> dict[str, Any]:
    """Later options are left out where not given, so that caches from before them resume.

    ``template_date`` comes from the job: it is of account where the template asks for it.
    """
    fields = {k: v for k, v in asdict(options.prepare).items() if k not in ("template_date", "num_embeddings")}
    usual = asdict(PrepareOptions())
    for name in ("columns", "turns", "chat_template_kwargs", "system_prompt"):
        if fields[name] == usual[name]:
            del fields[name]
    if "columns" in fields:
        fields["columns"] = dict(options.prepare.columns)
    if "chat_template_kwargs" in fields:
        fields["chat_template_kwargs"] = options.prepare.template_kwargs
    return fields


def template_date(tokenizer: Any, options: PrepareOptions, stored: Manifest | None) -> str | None:
    """The date that the chat template is told, ``YYYY-MM-DD``: what was asked for, or that of the cache that is there,
    or today. None where the template does not ask for it."""
    if not uses_date(json.dumps(tokenizer.chat_template or "")):
        return None
    if options.template_date is not None:
        return options.template_date
    if stored is not None:
        # Caches of earlier versions do not say.
        return stored.identity.get("template_date")
    return date.today().isoformat()


def _division(target: TargetOptions) -> dict[str, Any]:
    """How the target is divided, and by which backend; what is not is left out, as before it could be."""
    if target.backend == "transformers":
        size = {"tp_size": world_size()} if target.tp_plan else {}
        return {**size, **({"expert_parallel": True} if target.expert_parallel else {})}
    names = ("backend", "tensor_parallel", "pipeline_parallel", "expert_parallel")
    return {name: getattr(target, name) for name in names}


def software(device: torch.device) -> dict[str, str]:
    """Versions and hardware of this run, which rounding may depend on: the same bytes come from the same of these."""
    found = {package: version for package in (*PACKAGES, *KERNELS) if (version := _version(package))}
    return {**found, "python": platform.python_version(), **hardware(device)}


def other_software(created_with: Mapping[str, str], now: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """What differs between the run that began a cache and this one: name -> both, such as ``2.9.0``, ``absent``."""
    # Caches of earlier versions did not say all of it.
    names = [*created_with, *(now if "cpu_capability" in created_with else ())]
    both = {name: (created_with.get(name, "absent"), now.get(name, "absent")) for name in names}
    return {name: pair for name, pair in both.items() if pair[0] != pair[1]}


def compare_hardware(where: str, created_with: Mapping[str, str], device: torch.device, strict: bool) -> None:
    """Say what rounding may depend on and is not as it was, or refuse to go on.

    Raises:
        MismatchError: something differs, and ``strict``.
    """
    changed = other_software(created_with, software(device))
    if changed and strict:
        raise MismatchError(
            f"{where}: was begun with other hardware or software, which may round otherwise. Different:",
            changed,
            "Go on where it was begun, or leave out --strict-hardware.",
        )
    if changed:
        list_ = ", ".join(f"{name} {was} -> {now}" for name, (was, now) in changed.items())
        say(f"warning: this cache was begun with other hardware or software; rounding may differ: {list_}")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
