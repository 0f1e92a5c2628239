"""Tokens back to text, cut where learned and other tokens meet: what people look at."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from extractor.terminal.learned_text import Stretch


def stretches(
    tokenizer: Any, input_ids: np.ndarray, loss_mask: np.ndarray, start: int = 0, stop: int | None = None
) -> list[Stretch]:
    """Tokens ``start`` to ``stop`` (not included) of a sample as text, special tokens included.

    Args:
        tokenizer: of the target.
        input_ids: int ``[T]``.
        loss_mask: int ``[T]``.
        start: first token.
        stop: None: all.
    """
    stop = len(input_ids) if stop is None else min(stop, len(input_ids))
    if start >= stop:
        return []
    changes = np.flatnonzero(np.diff(loss_mask[start:stop])) + start + 1
    bounds = [start, *changes.tolist(), stop]
    found, before = [], _text(tokenizer, input_ids[:start])
    for first, last in itertools.pairwise(bounds):
        # With all that stands before: many tokenizers write a token otherwise where a text begins.
        until = _text(tokenizer, input_ids[:last])
        whole = until.startswith(before)
        text = until[len(before) :] if whole else _text(tokenizer, input_ids[first:last])
        found.append(Stretch(text, bool(loss_mask[first])))
        before = until
    return found


def _text(tokenizer: Any, ids: np.ndarray) -> str:
    if not len(ids):
        return ""
    return str(tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False))
