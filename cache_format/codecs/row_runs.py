"""Rows cut into runs."""

from __future__ import annotations


def row_runs(count: int, at_once: int) -> list[slice]:
    """``count`` rows in runs of ``at_once``, or of one where that is less; the last may be shorter."""
    step = max(1, at_once)
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]
