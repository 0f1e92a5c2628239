"""What the attacks have in common: find a file of the cache, change its header or the manifest. Not an attack."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cache_format.layout.index import INDEX_NAME, Index, read_index, write_index
from cache_format.layout.manifest import MANIFEST_NAME, Manifest, _checksum

Change = Callable[[dict[str, Any]], Any]


def shard(cache: Path, number: int = 0) -> Path:
    """The file of a shard."""
    return cache / "shards" / f"shard-{number:05d}.safetensors"


def change_header(path: Path, change: Change) -> None:
    """Let ``change`` edit the JSON header in place (or return text); the tensors stay where they are."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    text = change(header)
    text = text.encode() if isinstance(text, str) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def change_manifest(cache: Path, change: Change) -> None:
    """Let ``change`` edit the manifest, and make its own checksum right again."""
    path = cache / MANIFEST_NAME
    content = json.loads(path.read_bytes())
    content.pop("checksum")
    change(content)
    path.write_text(json.dumps({**content, "checksum": _checksum(content)}))


def change_index(cache: Path, **columns: Callable[[np.ndarray], np.ndarray]) -> None:
    """Rewrite index.arrow with some columns changed, under the right fingerprint."""
    fingerprint = Manifest.read(cache).fingerprint
    index = read_index(cache / INDEX_NAME, fingerprint)
    new = {name: np.array(getattr(index, name)) for name in Index.__slots__}
    for name, change in columns.items():
        new[name] = change(new[name]).astype(new[name].dtype)
    write_index(cache / INDEX_NAME, Index(**new), fingerprint)
