"""Samples to browse: their text, what is learned of it, and the row each came from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Any

import numpy as np

from cache_format.reading.open_cache import OpenCache
from extractor.data.stretches import stretches
from extractor.terminal.learned_text import Stretch, printable

MOST_ROWS = 150
FIRST_TOKENS, LAST_TOKENS = 384, 128
"""Of a longer sample the middle is left out."""

MOST_CHARACTERS = 800_000
"""Of text in all, as HTML: the page stays below 2 MB."""


@dataclass(frozen=True, kw_only=True)
class BrowsedRow:
    """One sample."""

    sample_id: int
    source: str
    """file and row in it, counted from 1; "" where it was not looked up"""
    shard: int
    tokens: int
    learned: int
    begin: list[Stretch]
    left_out: int
    """tokens between the two"""
    end: list[Stretch]
    """empty where nothing is left out"""

    @property
    def share(self) -> float:
        """Learned tokens over all."""
        return self.learned / max(self.tokens, 1)


def choose_rows(num_tokens: np.ndarray, num_loss_tokens: np.ndarray, samples: np.ndarray) -> list[int]:
    """At most 150 of ``samples`` (positions in the index), ascending: the shortest, the longest, the least and the most
    learned, and others spread evenly."""
    if len(samples) <= MOST_ROWS:
        return sorted(samples.tolist())
    share = num_loss_tokens[samples] / np.maximum(num_tokens[samples], 1)
    ends = [order[i] for order in (np.argsort(num_tokens[samples]), np.argsort(share)) for i in (0, 1, 2, -3, -2, -1)]
    spread = np.linspace(0, len(samples) - 1, MOST_ROWS - len(ends)).astype(int)
    return sorted(set(np.sort(samples)[spread].tolist()) | set(samples[ends].tolist()))


def browse(
    cache: OpenCache,
    tokenizer: Any,
    samples: Iterable[int],
    sources: Mapping[int, str],
    looked: Callable[[], None] = lambda: None,
) -> list[BrowsedRow]:
    """Rows for ``samples``, as far as the room in the page goes.

    Args:
        cache: whose tokens are read.
        tokenizer: the cache's own; None: token ids stand for text.
        samples: positions in the index.
        sources: sample_id -> place of its row.
        looked: called after each.
    """
    rows: list[BrowsedRow] = []
    room = MOST_CHARACTERS
    for i in samples:
        row = _row(cache, tokenizer, i, sources)
        room -= sum(len(escape(part.text)) + 40 for part in (*row.begin, *row.end))
        if room < 0:
            break
        rows.append(row)
        looked()
    return rows


def _row(cache: OpenCache, tokenizer: Any, i: int, sources: Mapping[int, str]) -> BrowsedRow:
    sample_id = int(cache.index.sample_id[i])
    # Not cache[i]: its states are not wanted, and at a URL would be fetched.
    shard, start, stop = cache.locate(i)
    ids, mask = (shard.rows(name, start, stop).numpy().astype(np.int64) for name in ("input_ids", "loss_mask"))
    cut = len(ids) > FIRST_TOKENS + LAST_TOKENS
    begin = FIRST_TOKENS if cut else len(ids)
    return BrowsedRow(
        sample_id=sample_id,
        source=sources.get(sample_id, ""),
        shard=int(cache.index.shard[i]),
        tokens=len(ids),
        learned=int(mask.sum()),
        begin=_text(tokenizer, ids, mask, 0, begin),
        left_out=len(ids) - begin - LAST_TOKENS if cut else 0,
        end=_text(tokenizer, ids, mask, len(ids) - LAST_TOKENS, len(ids)) if cut else [],
    )


def _text(tokenizer: Any, ids: np.ndarray, mask: np.ndarray, start: int, stop: int) -> list[Stretch]:
    if tokenizer is not None:
        return [Stretch(printable(part.text), part.learned) for part in stretches(tokenizer, ids, mask, start, stop)]
    bounds = [start, *(np.flatnonzero(np.diff(mask[start:stop])) + start + 1).tolist(), stop]
    return [
        Stretch(" ".join(map(str, ids[first:last].tolist())) + " ", bool(mask[first]))
        for first, last in pairwise(bounds)
    ]
