"""Seal: once every shard is there, write the tables and set the state to complete - in that order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np

from cache_format.codecs.token_snr import median_db, worst_db
from cache_format.layout.index import (
    INDEX_NAME,
    SHARDS_NAME,
    Part,
    ShardRow,
    tables_from_shards,
    write_index,
    write_shards,
)
from cache_format.layout.manifest import Manifest, Measured
from cache_format.storage.file_info import FileInfo, file_info
from cache_format.storage.folder import Folder, LocalFolder


def seal(
    cache: Path, manifest: Manifest, shards: Folder | None = None, known: Mapping[int, Part] = MappingProxyType({})
) -> Manifest:
    """Write index.arrow and shards.arrow from the shards, then the manifest of state complete.

    Samples that are in no shard are listed as quarantined.

    Args:
        cache: the folder in which it is written.
        manifest: of state extracting.
        shards: where the shards are; None: in ``cache``.
        known: what the tables say of shards that need not be read.

    Raises:
        CacheError: a shard is missing or damaged; nothing was written.
        StorageError: the operating system refused; the cache stays incomplete.
    """
    assert manifest.totals is not None
    rows, index = tables_from_shards(
        shards or LocalFolder(cache), manifest.schema(), range(manifest.totals.shards), known
    )
    write_index(cache / INDEX_NAME, index, manifest.fingerprint)
    write_shards(cache / SHARDS_NAME, rows, manifest.fingerprint)
    stored = np.zeros(manifest.totals.samples, bool)
    stored[index.sample_id] = True
    sealed = replace(
        manifest,
        state="complete",
        quarantined=np.flatnonzero(~stored).tolist(),
        measured=measure(manifest, rows),
        files=dict(sorted((manifest.files | describe_files(cache, [INDEX_NAME, SHARDS_NAME])).items())),
    )
    sealed.write(cache)
    return sealed


def measure(manifest: Manifest, rows: Sequence[ShardRow]) -> Measured:
    """What the codec made of the states of all shards."""
    before = sum(row.tokens for row in rows) * manifest.schema().states.row_bytes
    energy, error = (np.array([getattr(row, name) for row in rows]) for name in ("energy", "error_energy"))
    snr: list[float] = []
    if energy.size:
        ratios = np.clip(np.nan_to_num(energy.sum(0) / np.maximum(error.sum(0), 1e-300)), 1e-20, 1e20)
        snr = np.round(10 * np.log10(ratios), 2).tolist()
    counts = [row.token_snr for row in rows if row.token_snr is not None]
    tokens: list[np.ndarray] = []
    if counts and len(counts) == len(rows):
        of_all: np.ndarray = np.stack(counts).sum(axis=0, dtype=np.int64)
        tokens = [of_layer for of_layer in of_all if of_layer.any()]
    return Measured(
        ratio=round(sum(row.states_bytes for row in rows) / max(before, 1), 4),
        snr_db=snr,
        median_snr_db=[median_db(of_layer) for of_layer in tokens],
        worst_snr_db=[worst_db(of_layer) for of_layer in tokens],
    )


def describe_files(cache: Path, names: Iterable[str]) -> dict[str, FileInfo]:
    """Size and checksum of files below ``cache``.

    Raises:
        CacheError: one is missing.
    """
    return {name: file_info(cache / name) for name in names}
