"""An Arrow message whose buffers claim 2^62 bytes."""

from __future__ import annotations

import struct
from pathlib import Path


def attack(cache: Path) -> None:
    path = cache / "index.arrow"
    data = bytearray(path.read_bytes())
    # Every 8-byte number of the metadata that is a plausible length becomes an absurd one.
    for at in range(8, min(len(data), 1400) - 8, 8):
        (number,) = struct.unpack_from("<q", data, at)
        if 0 < number < 1 << 20:
            struct.pack_into("<q", data, at, 1 << 62)
    path.write_bytes(bytes(data))
