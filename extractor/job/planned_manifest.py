"""The manifest of a cache whose samples are there and whose target has been loaded: what extract and import write."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cache_format.codecs import codec_from_dict
from cache_format.layout.manifest import DataInfo, Manifest, TargetInfo, Totals, codec_identity
from cache_format.layout.samples import PreparedSamples, part_path
from cache_format.writing.seal import describe_files
from extractor.target.backend import TargetBackend
from extractor.target.factors import named_factors
from extractor.target.load_target import TargetShape
from extractor.target.target_files import write_target_files


def target_info(name: str, shape: TargetShape) -> TargetInfo:
    """What is known of target ``name`` before it is loaded."""
    return TargetInfo(
        name=name,
        model_type=shape.model_type,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_hidden_layers,
        vocab_size=shape.vocab_size,
        tie_word_embeddings=shape.tie_word_embeddings,
    )


def planned_manifest(
    folder: Path,
    manifest: Manifest,
    samples: PreparedSamples,
    backend: TargetBackend,
    *,
    config: Any,
    tokenizer: Any,
    data: DataInfo,
    num_shards: int,
    decided: Mapping[str, Any],
    tell: Callable[[str], None],
) -> Manifest:
    """The manifest of state extracting; the target's folder is written first.

    Args:
        folder: of the cache; it holds the samples' parts and no others.
        manifest: of state preparing.
        samples: all of them.
        backend: the target, loaded.
        config: the target's.
        tokenizer: the target's.
        data: what became of the data.
        num_shards: of the plan.
        decided: what only the loaded target has decided; joins the identity.
        tell: is told what the cache will lack.

    Raises:
        StorageError: the operating system refused.
    """
    tied, scale = write_target_files(folder, backend.embeddings, config, tokenizer, backend.dtype)
    factors = backend.factors or named_factors(config)
    if factors.head_problem:
        tell(f"warning: the cache will have no LM head: {factors.head_problem}")
    totals = Totals(
        parts=sum(1 for _ in (folder / "samples").glob("samples-*.arrow")),
        samples=len(samples),
        tokens=int(samples.num_tokens.sum()),
        loss_tokens=int(samples.num_loss_tokens.sum()),
        shards=num_shards,
    )
    paths = [part_path(folder / "samples", number) for number in range(totals.parts)]
    paths += sorted(path for path in (folder / "target").rglob("*") if path.is_file())
    codec = codec_identity(codec_from_dict(manifest.codec))
    return manifest.extracting(
        {**manifest.identity, **decided, "samples": samples.digest(), **codec},
        target=replace(manifest.target, tie_word_embeddings=tied, embed_scale=scale, **asdict(factors)),
        data=data,
        totals=totals,
        files=describe_files(folder, [path.relative_to(folder).as_posix() for path in paths]),
    )
