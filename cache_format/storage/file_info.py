"""Size and checksum of a whole file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import xxhash

from cache_format.errors import StorageError
from cache_format.storage.paths import open_for_reading


@dataclass(frozen=True, kw_only=True)
class FileInfo:
    """A file beside the shards, as it was committed."""

    bytes: int
    checksum: str
    """xxh3_64 of the whole file, 16 hex digits"""


def file_info(path: Path) -> FileInfo:
    """Size and checksum of a file, read in chunks.

    Raises:
        CacheError: missing.
        StorageError: the operating system refused.
    """
    hasher, size = xxhash.xxh3_64(), 0
    try:
        with open(open_for_reading(path), "rb", buffering=0) as file:
            while chunk := file.read(4 << 20):
                hasher.update(chunk)
                size += len(chunk)
    except OSError as error:
        raise StorageError(path, "read", error) from error
    return FileInfo(bytes=size, checksum=hasher.hexdigest())
