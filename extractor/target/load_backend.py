"""The backend of an extraction or of a recompute: the target loaded, hooked, tried out on padding."""

from __future__ import annotations

from pathlib import Path

import torch

from cache_format.errors import InputError
from cache_format.layout.captures import LAST_HIDDEN_STATES, Captures
from cache_format.layout.manifest import Manifest
from extractor.config import ExtractOptions, TargetOptions
from extractor.target.adapter import with_adapter
from extractor.target.backend import TargetBackend
from extractor.target.deterministic import be_deterministic
from extractor.target.hooks import HFDFlashTargetModel
from extractor.target.load_target import load_target, load_wanted
from extractor.target.padding import padding_mode
from extractor.target.tensor_parallel import Group, whole_embeddings
from extractor.target.transformers_backend import UNMASKED, TransformersBackend


def load_backend(
    options: ExtractOptions,
    *,
    dtype: torch.dtype,
    device: torch.device,
    target_layer_ids: list[int],
    longest: int,
    group: Group | None,
) -> TargetBackend:
    """Load the target that ``options`` name; of a divided one, this process's part.

    Args:
        options: of the extraction.
        dtype: of the weights.
        device: of this worker.
        target_layer_ids: to capture.
        longest: tokens of the longest sample, on which padding is tried out.
        group: the processes that the target is divided over.

    Raises:
        InputError: a target that cannot be run on padded batches, or not compiled.
    """
    wanted = options.target
    if wanted.backend == "vllm":
        from extractor.target.vllm.load import load_vllm

        assert options.plan.batch_tokens is not None
        return load_vllm(
            wanted,
            target_layer_ids,
            options.capture,
            dtype=dtype,
            device=device,
            longest=longest,
            batch_tokens=options.plan.batch_tokens,
        )
    if wanted.deterministic:
        be_deterministic()
    if group is not None:
        group.load()
    model = load_wanted(wanted, dtype, device, tp_size=None if group is None else group.size)
    embeddings = model if group is None else whole_embeddings(model)
    target = HFDFlashTargetModel(model, target_layer_ids)
    target.before_pass = None if group is None else group.announce
    if wanted.compile:
        target.compile()
    padding = _padding_mode(target, longest, dtype)
    return TransformersBackend(target, padding, options.capture, embeddings, dtype)


def load_backend_of(
    manifest: Manifest,
    name: str,
    device: torch.device,
    *,
    backend: str | None = None,
    longest: int,
    trust_remote_code: bool,
    adapter: Path | None = None,
) -> TargetBackend:
    """Load target ``name`` as the cache of ``manifest`` was made with it: hidden_states and, by transformers,
    last_hidden_states.

    Args:
        manifest: of the cache.
        name: of the target.
        device: of this process.
        backend: another than the cache was made with.
        longest: tokens of the longest sample that it is for, each to be run alone.
        trust_remote_code: run code that comes with the target.
        adapter: its folder.

    Raises:
        InputError: it cannot be loaded.
    """
    made_by = manifest.identity.get("backend", "transformers")
    backend = backend or made_by
    if backend == "vllm":
        from extractor.target.vllm.load import load_vllm

        names = ("tensor_parallel", "pipeline_parallel", "expert_parallel")
        divided = {key: manifest.identity[key] for key in names if backend == made_by and key in manifest.identity}
        options = {"trust_remote_code": trust_remote_code, "adapter": adapter, **divided}
        return load_vllm(
            TargetOptions(name=name, backend=backend, **options),
            manifest.target_layer_ids,
            Captures(),
            dtype=manifest.torch_dtype,
            device=device,
            longest=longest,
            batch_tokens=longest,
        )
    model = load_target(
        name,
        revision=None,
        dtype=manifest.torch_dtype,
        device=device,
        attn_implementation=manifest.identity.get("attn_implementation") if backend == made_by else None,
        experts_implementation=manifest.identity.get("experts_implementation") if backend == made_by else None,
        trust_remote_code=trust_remote_code,
    )
    model = model if adapter is None else with_adapter(model, adapter)
    target = HFDFlashTargetModel(model, manifest.target_layer_ids)
    padding = manifest.identity.get("padding", UNMASKED) if backend == made_by else UNMASKED
    captures = Captures(last_hidden_states=manifest.capture[LAST_HIDDEN_STATES])
    return TransformersBackend(target, padding, captures, dtype=manifest.torch_dtype)


def _padding_mode(target: HFDFlashTargetModel, longest: int, dtype: torch.dtype) -> str:
    try:
        return padding_mode(target, longest, dtype)
    except RuntimeError as error:
        if "dtype" in str(error):
            raise InputError(
                f"--dtype {str(dtype).removeprefix('torch.')}: the target's parts do not fit together in it "
                f"({str(error).splitlines()[0]}); pass the dtype of its checkpoint"
            ) from error
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        raise InputError(
            f"--compile: torch cannot compile this target here: {str(error).splitlines()[0]}. Install what is "
            "missing (Debian: apt-get install g++ python3-dev) and run the same command again, or begin another "
            "cache without --compile"
        ) from error
