"""Rows that gave no sample, by reason, with the places of some of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from cache_format.layout.manifest import DataInfo
from cache_format.layout.samples import PartInfo
from extractor.job.show import place

EXAMPLES, MOST_LOOKED_AT = 3, 30


@dataclass(frozen=True, kw_only=True)
class DroppedRows:
    """Rows left out for one reason."""

    reason: str
    """as in the manifest: too_long, few_loss_tokens, ...; of bad rows, what is wrong with them"""
    rows: int
    examples: list[str]
    """places such as ``train.jsonl row 17``; empty where they cannot be told"""
    certain: bool
    """False: the examples were dropped, for this reason or another one of the list"""


def dropped_rows(data: DataInfo, parts: Iterable[tuple[PartInfo, np.ndarray]]) -> list[DroppedRows]:
    """By reason, most rows first.

    Args:
        data: of the manifest, whose counts stand.
        parts: of samples/: what each says of itself, and its samples' ``source_row``. Rows that have no sample were
            dropped; where a part dropped rows for one reason alone, they are examples of it. Not read further than
            examples are missing.
    """
    wanted = {reason for reason, count in data.dropped.items() if count and reason != "bad_row"}
    certain: dict[str, list[int]] = {reason: [] for reason in wanted}
    perhaps: dict[str, list[int]] = {reason: [] for reason in wanted}
    for info, source_rows in parts:
        if all(len(rows) >= MOST_LOOKED_AT for rows in certain.values()):
            break
        _examples_of(info, source_rows, certain, perhaps)
    found = [
        DroppedRows(
            reason=reason,
            rows=data.dropped[reason],
            examples=_places(data, certain[reason] or perhaps[reason]),
            certain=bool(certain[reason]),
        )
        for reason in wanted
    ]
    found += [
        DroppedRows(reason=f"bad_row: {reason}", rows=bad.rows, examples=[bad.first], certain=True)
        for reason, bad in data.bad_rows.items()
    ]
    known = sum(bad.rows for bad in data.bad_rows.values())
    if data.dropped.get("bad_row", 0) > known:
        found.append(DroppedRows(reason="bad_row", rows=data.dropped["bad_row"] - known, examples=[], certain=False))
    return sorted(found, key=lambda one: (-one.rows, one.reason))


def _examples_of(
    info: PartInfo, source_rows: np.ndarray, certain: Mapping[str, list[int]], perhaps: Mapping[str, list[int]]
) -> None:
    reasons = [reason for reason, count in info.dropped.items() if count]
    if not reasons:
        return
    # As many rows as there are samples, and some: among them enough have none. A part may claim any number of rows.
    stop = min(info.stop_row, info.first_row + len(source_rows) + MOST_LOOKED_AT)
    missing = np.setdiff1d(np.arange(info.first_row, stop), source_rows)[:MOST_LOOKED_AT].tolist()
    into = certain if len(reasons) == 1 else perhaps
    for reason in reasons:
        if reason in into:
            into[reason].extend(missing[: MOST_LOOKED_AT - len(into[reason])])


def _places(data: DataInfo, rows: list[int]) -> list[str]:
    """Of the first of ``rows`` that are not known to be bad."""
    bad = {bad.first for bad in data.bad_rows.values()}
    return [where for where in (place(data, row) for row in rows) if where not in bad][:EXAMPLES]
