"""Columns of another Arrow type, whose values lie in another batch."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from cache_format.layout.index import INDEX_SCHEMA


def attack(cache: Path) -> None:
    names = [field.name for field in INDEX_SCHEMA]
    columns = [pa.array([0, 1, 2]).dictionary_encode() for _ in names]
    batch = pa.record_batch(columns, names=names)
    with pa.OSFile(str(cache / "index.arrow"), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)
