"""Lengths and learned tokens of samples, by source; pure functions of the index and the manifest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cache_format.layout.index import Index
from cache_format.layout.manifest import Manifest, SourceInfo

BINS, SHARE_BINS = 40, 20
MOST_SOURCES = 12
"""Shown one by one; the rest as one."""


@dataclass(frozen=True, kw_only=True)
class SourceFigures:
    """What one source gave; counts of stored samples."""

    name: str
    samples: int
    tokens: int
    learned: int
    lengths: list[int]
    """samples by their tokens, at ``SampleFigures.length_edges``"""
    learned_counts: list[int]
    """samples by their learned tokens, at the same edges"""
    learned_shares: list[int]
    """samples by their learned share, in 20 equal ranges from 0 to 1"""

    @property
    def share(self) -> float:
        """Learned tokens over all."""
        return self.learned / max(self.tokens, 1)


@dataclass(frozen=True, kw_only=True)
class SampleFigures:
    """All stored samples."""

    samples: int
    tokens: int
    learned: int
    length_quantiles: list[int]
    """tokens: shortest, 0.05, 0.5, 0.95, longest"""
    length_edges: list[float]
    max_length: int | None
    """of --max-length; None where the cache does not say"""
    at_max_length: int
    """samples of exactly that length: cut there, or just that long"""
    too_long: str
    """of --too-long"""
    without_learned: int
    """samples with no learned token"""
    sources: list[SourceFigures]
    quarantined: int


def sample_figures(index: Index, manifest: Manifest) -> SampleFigures:
    """Of the samples that ``index`` has."""
    tokens, learned = index.num_tokens.astype(np.int64), index.num_loss_tokens.astype(np.int64)
    longest = int(tokens.max(initial=1))
    edges = np.linspace(0, longest, min(BINS, longest) + 1)
    max_length = manifest.identity.get("max_length")
    max_length = max_length if isinstance(max_length, int) else None
    names, bounds = source_bounds(manifest.data.sources if manifest.data else [], manifest)
    places = np.searchsorted(index.sample_id, bounds)
    sources = []
    for name, first, stop in zip(names, places[:-1], places[1:], strict=True):
        sources.append(_source(name, tokens[first:stop], learned[first:stop], edges))
    quantiles = np.quantile(tokens, [0, 0.05, 0.5, 0.95, 1]) if len(tokens) else np.zeros(5)
    return SampleFigures(
        samples=len(tokens),
        tokens=int(tokens.sum()),
        learned=int(learned.sum()),
        length_quantiles=[round(q) for q in quantiles.tolist()],
        length_edges=edges.tolist(),
        max_length=max_length,
        at_max_length=int((tokens >= max_length).sum()) if max_length else 0,
        too_long=str(manifest.identity.get("too_long", "")),
        without_learned=int((learned == 0).sum()),
        sources=sources,
        quarantined=len(manifest.quarantined),
    )


def source_bounds(sources: Sequence[SourceInfo], manifest: Manifest) -> tuple[list[str], np.ndarray]:
    """Names, and the first sample_id of each and one more: samples are in the order of their sources."""
    total = manifest.totals.samples if manifest.totals else 0
    if len(sources) < 2:
        return [manifest.data.name if manifest.data else ""], np.asarray([0, total])
    named = [(s.name + (f":{s.split}" if s.split else ""), min(max(s.samples, 0), total)) for s in sources]
    if len(named) > MOST_SOURCES:
        rest = sum(count for _, count in named[MOST_SOURCES - 1 :])
        named = [*named[: MOST_SOURCES - 1], (f"{len(named) - MOST_SOURCES + 1} more sources", rest)]
    return [name for name, _ in named], np.cumsum([0, *(count for _, count in named)])


def _source(name: str, tokens: np.ndarray, learned: np.ndarray, edges: np.ndarray) -> SourceFigures:
    shares = learned / np.maximum(tokens, 1)
    return SourceFigures(
        name=name,
        samples=len(tokens),
        tokens=int(tokens.sum()),
        learned=int(learned.sum()),
        lengths=np.histogram(tokens, edges)[0].tolist(),
        learned_counts=np.histogram(learned, edges)[0].tolist(),
        learned_shares=np.histogram(shares, SHARE_BINS, (0, 1))[0].tolist(),
    )
