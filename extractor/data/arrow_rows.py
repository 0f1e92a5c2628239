"""Arrow tables -> rows, without the nulls that Arrow put there.

A struct in Arrow has all keys in every row: a key that one row has is null in all others, and templates take it for
present. So nulls in structs are dropped, but for two kinds that were certainly written so: a key that is null in every
row (it would not be there otherwise), and the content of a turn. Where other nulls matter (``"default": null`` in a
tool), they stay in JSON lines, and in columns that hold JSON text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa

from extractor.data.bad_row import BadRow

Prune = Callable[[Any], Any]


def rows_of(table: pa.Table) -> list[dict[str, Any] | BadRow]:
    """The rows of ``table`` as Python objects; what is wrong with one that is damaged, in its place.

    Arrow itself reads past the end of its memory where a file's offsets say so; it is checked before.
    """
    try:
        table.validate(full=True)
        return [*_rows_of(table)]
    except (pa.ArrowException, ValueError) as error:
        if len(table) == 1:
            return [BadRow(f"is damaged: {error}")]
    return [row for number in range(len(table)) for row in rows_of(table.slice(number, 1))]


def _rows_of(table: pa.Table) -> list[dict[str, Any]]:
    columns = []
    for name in table.column_names:
        column = table.column(name)
        values, prune = column.to_pylist(), _pruner(column.type)
        columns.append(values if prune is None else [prune(value) for value in values])
    return [dict(zip(table.column_names, values, strict=True)) for values in zip(*columns, strict=True)]


def _pruner(kind: pa.DataType) -> Prune | None:
    """The function that drops invented nulls from values of ``kind``; None where there can be none."""
    if isinstance(kind, pa.BaseExtensionType):
        return _pruner(kind.storage_type)
    if pa.types.is_map(kind):
        return _map_pruner(_pruner(kind.item_type))
    if pa.types.is_struct(kind):
        return _struct_pruner(kind)
    if any(is_list(kind) for is_list in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)):
        item = _pruner(kind.value_type)
        return None if item is None else lambda values: None if values is None else [item(value) for value in values]
    return None


def _map_pruner(item: Prune | None) -> Prune:
    def prune(pairs: Any) -> Any:
        return None if pairs is None else {key: item(value) if item else value for key, value in pairs}

    return prune


def _struct_pruner(kind: pa.DataType) -> Prune:
    fields = [kind.field(number) for number in range(kind.num_fields)]
    names = {field.name for field in fields}
    kept = {field.name for field in fields if pa.types.is_null(field.type)}
    kept |= {"content"} if "role" in names else {"value"} if "from" in names else set()
    pruners = {field.name: _pruner(field.type) for field in fields}

    def prune(value: Any) -> Any:
        if value is None:
            return None
        found = {}
        for name, item in value.items():
            if item is not None or name in kept:
                pruner = pruners[name]
                found[name] = item if pruner is None else pruner(item)
        return found

    return prune
