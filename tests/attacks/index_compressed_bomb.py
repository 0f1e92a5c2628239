"""An index whose buffers say themselves how large they are once decompressed."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from cache_format.layout.index import INDEX_SCHEMA


def attack(cache: Path) -> None:
    batch = pa.record_batch([pa.array([0] * 1_000_000, field.type) for field in INDEX_SCHEMA], schema=INDEX_SCHEMA)
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    path = str(cache / "index.arrow")
    with pa.OSFile(path, "wb") as file, pa.ipc.new_file(file, batch.schema, options=options) as writer:
        writer.write_batch(batch)
