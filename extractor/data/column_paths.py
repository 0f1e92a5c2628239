"""Columns inside columns: ``--columns response=answers.0.text`` goes into lists and objects, a name or number a dot.

A path is treated as one more column of the row. A column whose own name has dots comes first.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any


def head(path: str) -> str:
    """The column that a path begins in."""
    return path.partition(".")[0]


def paths_among(named: Iterable[str], columns: Collection[str]) -> tuple[str, ...]:
    """Those of the names that are no columns but lead into one."""
    return tuple(name for name in named if name not in columns and "." in name and head(name) in columns)


def with_paths(row: Mapping[str, Any], paths: Sequence[str]) -> dict[str, Any]:
    """``row`` and, under its path, what each of ``paths`` leads to; None where it leads nowhere."""
    return {**row, **{path: _value_at(row, path) for path in paths}}


def _value_at(value: Any, path: str) -> Any:
    for step in path.split("."):
        if isinstance(value, Mapping):
            value = value.get(step)
        elif isinstance(value, list) and step.isascii() and step.isdigit() and int(step[:9]) < len(value):
            value = value[int(step[:9])]
        else:
            return None
    return value
