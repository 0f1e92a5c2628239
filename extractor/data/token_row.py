"""A pre-tokenised row -> its ids and loss mask, as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from extractor.data.bad_row import BadRow

Row = Mapping[str, Any]


def ids_of(row: Row, vocab_size: int, loss_on: str, pad_id: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Token ids (int32 ``[T]``) and loss mask (uint8 ``[T]``) of a pre-tokenised row.

    ``loss_on="column"`` takes ``loss_mask``, or else ``labels``: unshifted, -100 where nothing is learned.
    ``"all"`` learns every token. ``pad_id``: the tokenizer's padding.

    Raises:
        BadRow: it is malformed, or padded.
    """
    ids = _integers(row, "input_ids")
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        wrong = int(ids.min() if ids.min() < 0 else ids.max())
        raise BadRow(f"token id {wrong} in 'input_ids' is outside the tokenizer's 0..{vocab_size - 1}")
    if row.get("attention_mask") is not None and not _integers(row, "attention_mask", len(ids)).all():
        raise BadRow("'attention_mask' has zeros: store the row without padding")
    # One such token may be the end of a text, where the tokenizer pads with it.
    if pad_id is not None and len(ids) > 2 and any((end == pad_id).all() for end in (ids[:2], ids[-2:])):
        raise BadRow(f"'input_ids' begins or ends with padding (token {pad_id}): store the row without padding")
    if loss_on == "all":
        return ids.astype(np.int32), np.ones(len(ids), np.uint8)
    if row.get("loss_mask") is not None:
        mask = _integers(row, "loss_mask", len(ids))
        if not np.isin(mask, (0, 1)).all():
            raise BadRow("'loss_mask' holds something other than 0 and 1")
        return ids.astype(np.int32), mask.astype(np.uint8)
    labels = _integers(row, "labels", len(ids))
    learned = labels != -100
    if (labels[learned] != ids[learned]).any():
        raise BadRow("'labels' differ from 'input_ids' where they are not -100; they must be unshifted")
    return ids.astype(np.int32), learned.astype(np.uint8)


def _integers(row: Row, column: str, length: int | None = None) -> np.ndarray:
    values = row.get(column)
    try:
        array = np.asarray(values)
    except ValueError:
        array = np.asarray(None)
    if array.ndim == 1 and array.size == 0:
        array = array.astype(np.int64)
    if not isinstance(values, list) or array.ndim != 1 or array.dtype.kind not in "iub":
        raise BadRow(f"{column!r} is not a list of whole numbers" if values is not None else f"{column!r} is missing")
    if length is not None and len(array) != length:
        raise BadRow(f"{column!r} has {len(array)} entries, 'input_ids' has {length}")
    return array.astype(np.int64)
