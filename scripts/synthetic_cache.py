"""Caches without a target: states of any size, written through the real writer and sealed. For tests and benchmarks."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from cache_format.codecs import CalibrationShare, Codec, States, codec_named
from cache_format.layout.captures import Captures
from cache_format.layout.embeddings import EMBED, EMBEDDINGS_NAME, HEAD, write_embeddings
from cache_format.layout.manifest import DataInfo, Manifest, TargetInfo, Totals, codec_identity
from cache_format.layout.samples import PartInfo, PreparedSamples, Sample, part_path, write_part
from cache_format.layout.shard_layout import shard_name
from cache_format.storage.commit import make_folder
from cache_format.writing.encode import encode_buffer
from cache_format.writing.seal import describe_files, seal
from cache_format.writing.shard_buffer import ShardBuffer
from extractor.config import PlanOptions
from extractor.job.plan import Plan

VOCAB = 64


def random_samples(lengths: Sequence[int], seed: int = 0) -> list[Sample]:
    """Samples of the given lengths with random tokens and masks."""
    rng = np.random.default_rng(seed)
    return [
        Sample(rng.integers(0, VOCAB, n).astype(np.int32), rng.integers(0, 2, n).astype(np.uint8), row)
        for row, n in enumerate(lengths)
    ]


def write_cache(
    cache: Path,
    lengths: Sequence[int],
    *,
    dtype: str,
    hidden: int,
    target_layer_ids: list[int],
    shard_bytes: int,
    states: Callable[[int, int], torch.Tensor],
    quarantined: tuple[int, ...] = (),
    only_shards: list[int] | None = None,
    name: str = "synthetic",
    codec: str = "raw",
    capture: Captures | None = None,
) -> list[Sample]:
    """A complete cache of samples of ``lengths`` (or, with ``only_shards``, one still extracting); returns its samples.

    ``states(sample_id, num_tokens)`` gives hidden_states ``[num_tokens, L*hidden]`` in ``dtype``; what ``capture`` adds
    is random.
    """
    for folder in ("samples", "shards", "target"):
        make_folder(cache / folder)
    samples = random_samples(lengths)
    half = len(samples) // 2
    write_part(part_path(cache / "samples", 0), samples[:half], PartInfo(0, half, {"bad_row": 0}))
    write_part(part_path(cache / "samples", 1), samples[half:], PartInfo(half, len(samples), {}))
    prepared = PreparedSamples(cache / "samples", 2)
    weights = torch.Generator().manual_seed(0)
    write_embeddings(
        cache / EMBEDDINGS_NAME,
        {key: torch.randn(VOCAB, hidden, generator=weights) for key in (EMBED, HEAD)},
    )
    begun = Manifest(
        state="preparing",
        identity={"name": name, "codec": codec_named(codec).asked},
        target=TargetInfo(
            name=name,
            model_type="qwen3",
            hidden_size=hidden,
            num_hidden_layers=max(target_layer_ids) + 1,
            vocab_size=VOCAB,
            tie_word_embeddings=False,
        ),
        target_layer_ids=target_layer_ids,
        dtype=dtype,
        codec=codec_named(codec).asked,
        capture=(capture or Captures()).to_dict(),
        created_with={},
        token_snr=not codec_named(codec).lossless,
    )
    schema_bytes = begun.schema().raw.token_bytes
    plan = Plan(prepared.num_tokens, schema_bytes, PlanOptions(shard_bytes=shard_bytes))
    calibrated = _calibrated(codec_named(codec), begun.schema().states, plan, states, quarantined)
    manifest = begun.extracting(
        {**begun.identity, **codec_identity(calibrated), "samples": prepared.digest()},
        codec=calibrated.to_dict(),
        data=DataInfo(name="synthetic.jsonl", rows=len(samples), dropped={}),
        totals=Totals(
            parts=2,
            samples=len(samples),
            tokens=int(prepared.num_tokens.sum()),
            loss_tokens=int(prepared.num_loss_tokens.sum()),
            shards=len(plan),
        ),
        files=describe_files(cache, ["samples/samples-00000.arrow", "samples/samples-00001.arrow", EMBEDDINGS_NAME]),
    )
    manifest.write(cache)
    schema = manifest.schema()
    buffer = ShardBuffer(max([1, *plan.shard_bytes(schema.raw).tolist()]))
    for shard in plan:
        if only_shards is not None and shard.number not in only_shards:
            continue
        buffer.begin(schema.raw, shard.number, shard.sample_ids, shard.num_tokens)
        for i, sample_id in enumerate(shard.sample_ids.tolist()):
            rows = slice(int(buffer.cu_seqlens[i]), int(buffer.cu_seqlens[i + 1]))
            sample = samples[sample_id]
            buffer.tensor("hidden_states")[rows] = states(sample_id, len(sample.input_ids))
            buffer.tensor("input_ids").numpy()[rows] = sample.input_ids
            buffer.tensor("loss_mask").numpy()[rows] = sample.loss_mask
            for tensor in schema.captures:
                into = buffer.tensor(tensor.name)[rows]
                into.copy_(random_capture(sample_id, tuple(into.shape), into.dtype))
        kept = buffer.without(np.isin(shard.sample_ids, quarantined)) if quarantined else buffer
        if codec != "raw":
            kept = encode_buffer(kept, schema, None)
        kept.commit(cache / shard_name(shard.number))
    if only_shards is None:
        seal(cache, manifest)
    return samples


def _calibrated(
    codec: Codec, kind: States, plan: Plan, states: Callable[[int, int], torch.Tensor], quarantined: tuple[int, ...]
) -> Codec:
    """With the rows that extract would take."""
    if codec.is_calibrated:
        return codec
    share, rows = CalibrationShare.of(len(plan)), []
    for number in range(min(share.shards, len(plan))):
        ids, lengths = plan.samples_of(number)
        kept = [states(i, n) for i, n in zip(ids.tolist(), lengths.tolist(), strict=True) if i not in quarantined]
        rows += [torch.cat(kept)[: share.rows]] if kept else []
    return codec.calibrated(torch.cat(rows), kind)


def random_capture(sample_id: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Token ids, or numbers in descending order."""
    generator = torch.Generator().manual_seed(sample_id)
    if not dtype.is_floating_point:
        return torch.randint(VOCAB, shape, generator=generator).to(dtype)
    return torch.randn(shape, generator=generator).sort(dim=-1, descending=True).values.to(dtype)


def write_large_cache(cache: Path, gib: float, *, hidden: int = 4096, longest: int = 4096) -> None:
    """A bfloat16 cache of about ``gib`` GiB, five layers, samples of log-normal length, shards of 512 MiB."""
    width, rng = 5 * hidden, np.random.default_rng(0)
    lengths: list[int] = []
    while sum(lengths) * width * 2 < gib * 2**30:
        lengths.append(int(np.clip(rng.lognormal(6.3, 0.8), 16, longest)))
    pool = torch.randn(longest, width).to(torch.bfloat16)
    write_cache(
        cache,
        lengths,
        dtype="bfloat16",
        hidden=hidden,
        target_layer_ids=[1, 9, 17, 25, 33],
        shard_bytes=512 << 20,
        states=lambda _sample_id, num_tokens: pool[:num_tokens],
    )


def drop_pages(folder: Path) -> None:
    """Drop every file below ``folder`` from the page cache (needs no root)."""
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)
