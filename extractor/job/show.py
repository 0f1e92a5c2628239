"""show: one sample of a cache, where it came from, and the norms of its states."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cache_format.batch import DFlashTargetBatch
from cache_format.errors import CacheError, DFlashCacheError, InputError
from cache_format.layout.manifest import DataInfo, Manifest
from cache_format.layout.samples import part_path, read_part
from cache_format.reading.feature_cache import FeatureCache
from cache_format.storage.folder import Folder
from extractor.data.stretches import stretches
from extractor.target.load_target import load_tokenizer
from extractor.terminal.learned_text import Stretch, one_line, painted, printable, rule


@dataclass(frozen=True, kw_only=True)
class LayerNorms:
    """Euclidean norms of one layer's states in a sample, one a token."""

    layer: int
    median: float
    first: float
    """of the first token; real targets give it tens of times the others' norm"""
    largest: float
    largest_at: int
    """token"""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A sample, looked up."""

    cache: str
    sample_id: int
    source: str
    """file and row in it, counted from 1; ``""`` where the prepared samples cannot be read"""
    shard: int
    tokens: int
    learned: int
    start: int
    stop: int
    """the tokens asked for"""
    input_ids: list[int]
    loss_mask: list[int]
    """of these"""
    text: list[Stretch]
    """of these; empty where the cache's tokenizer cannot be loaded"""
    problem: str
    """why there is no text"""
    norms: list[LayerNorms]
    """over the whole sample"""


def look_up(cache: Path | str, sample_id: int, start: int = 0, stop: int | None = None) -> Shown:
    """Sample ``sample_id``; text of its tokens ``start`` to ``stop`` (not included; None: to its end).

    Reads that sample's bytes, from a cache at a URL by range. The cache need not be complete.

    Raises:
        InputError: no such sample, or no such tokens.
        CacheError: not a cache, or damaged (the sample's checksum is compared).
    """
    opened = FeatureCache.open(cache, allow_incomplete=True, verify="sample")
    manifest = opened.manifest
    assert manifest.totals is not None
    i = int(np.searchsorted(opened.index.sample_id, sample_id))
    if i == len(opened) or opened.index.sample_id[i] != sample_id:
        raise InputError(f"{cache}: {_why_not(sample_id, manifest)}")
    sample = opened[i]
    ids, mask = sample.input_ids[0].numpy(), sample.loss_mask[0].numpy()
    stop = len(ids) if stop is None else min(stop, len(ids))
    if not 0 <= start < stop:
        raise InputError(f"--from {start} --to {stop}: sample {sample_id} has the tokens 0 to {len(ids)}")
    text, problem = _text(opened, ids, mask, start, stop)
    return Shown(
        cache=opened.where,
        sample_id=sample_id,
        source=_source(opened.folder, manifest, sample_id),
        shard=int(opened.index.shard[i]),
        tokens=len(ids),
        learned=int(mask.sum()),
        start=start,
        stop=stop,
        input_ids=ids[start:stop].tolist(),
        loss_mask=mask[start:stop].tolist(),
        text=text,
        problem=problem,
        norms=layer_norms(sample, manifest.target_layer_ids),
    )


def _why_not(sample_id: int, manifest: Manifest) -> str:
    assert manifest.totals is not None
    if not 0 <= sample_id < manifest.totals.samples:
        return f"there is no sample {sample_id}; it has 0 to {manifest.totals.samples - 1}"
    if sample_id in manifest.quarantined:
        return f"sample {sample_id} is quarantined: the target gave NaN or Inf for it, and no states are stored"
    return f"sample {sample_id} is not there yet: its shard is not made, or it gave NaN or Inf (--on-nonfinite)"


def layer_norms(sample: DFlashTargetBatch, layer_ids: list[int]) -> list[LayerNorms]:
    """Of hidden_states ``[1, T, L*H]``, layer by layer in their order, in float32."""
    found = []
    for layer, states in zip(layer_ids, sample.hidden_states[0].chunk(len(layer_ids), dim=1), strict=True):
        norms = torch.linalg.vector_norm(states.float(), dim=1)
        found.append(
            LayerNorms(
                layer=layer,
                median=float(norms.median()),
                first=float(norms[0]),
                largest=float(norms.max()),
                largest_at=int(norms.argmax()),
            )
        )
    return found


def _text(cache: FeatureCache, ids: np.ndarray, mask: np.ndarray, start: int, stop: int) -> tuple[list[Stretch], str]:
    try:
        tokenizer = stored_tokenizer(cache)
    except DFlashCacheError as error:
        return [], str(error)
    return stretches(tokenizer, ids, mask, start, stop), ""


def stored_tokenizer(cache: FeatureCache) -> Any:
    """The tokenizer in the cache itself; what it holds is checked, and no code comes with it.

    Raises:
        DFlashCacheError: it cannot be loaded.
    """
    for name, info in cache.manifest.files.items():
        if name.startswith("target/") and not name.endswith(".safetensors"):
            cache.folder.checked(name, info)
    return load_tokenizer(str(cache.path / "target"), None, False)


def _source(folder: Folder, manifest: Manifest, sample_id: int) -> str:
    assert manifest.data is not None
    assert manifest.totals is not None
    first = 0
    try:
        for number in range(manifest.totals.parts):
            name = part_path(Path("samples"), number).as_posix()
            batch, _ = read_part(folder.checked(name, manifest.files.get(name)))
            if sample_id < first + batch.num_rows:
                row = batch.column("source_row")[sample_id - first].as_py()
                return place(manifest.data, row)
            first += batch.num_rows
    except CacheError:
        return ""
    return ""


def place(data: DataInfo, row: int) -> str:
    """``train.jsonl row 17``, for row 16 of a dataset of that file alone."""
    files = [(first, file) for source in data.sources for file, first in source.files.items() if first <= row]
    first, file = max(files, default=(0, data.name))
    return f"{file} row {row - first + 1}"


def describe(shown: Shown, colour: bool) -> str:
    """``shown`` for a person."""
    share = 100 * shown.learned / shown.tokens
    some = "" if shown.stop - shown.start == shown.tokens else f", {shown.start:,} to {shown.stop:,} of them below"
    lines = [
        f"sample {shown.sample_id} of {one_line(shown.cache)}, in shard {shown.shard}",
        f"made from {one_line(shown.source) or 'a row that cannot be told: samples/ is damaged'}",
        rule(f"{shown.tokens:,} tokens, {shown.learned:,} learned ({share:.0f} %){some}", colour),
    ]
    if shown.problem:
        learned = [f"[[{i}]]" if m else str(i) for i, m in zip(shown.input_ids, shown.loss_mask, strict=True)]
        lines += [
            " ".join(learned),
            printable(f"token ids, since the cache's tokenizer cannot be loaded: {shown.problem}"),
        ]
    else:
        lines.append(painted(shown.text, colour).rstrip("\n"))
    lines.append(rule("norms of the states", colour))
    lines.append(f"{'layer':>6}{'median':>12}{'first token':>14}{'max':>12}  at token")
    for norms in shown.norms:
        figures = f"{norms.median:>12.4g}{norms.first:>14.4g}{norms.largest:>12.4g}"
        lines.append(f"{norms.layer:>6}{figures}  {norms.largest_at:,}")
    return "\n".join(lines)


def to_json(shown: Shown) -> str:
    """``shown`` for a program."""
    return json.dumps(asdict(shown))
