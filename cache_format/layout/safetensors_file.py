"""The safetensors container: header <-> tensor places, with every check that a foreign file needs.

Layout (https://github.com/huggingface/safetensors#format): 8 bytes little-endian header length, a JSON header
(trailing spaces allowed), then the tensors' bytes without gaps. Our own header code exists because shards are
filled in place and read row by row, which the library's save_file and get_slice don't do; files stay plain safetensors.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cache_format.codecs.dtypes import DTYPES
from cache_format.errors import CacheError
from cache_format.storage.byte_source import ByteSource
from cache_format.storage.host_memory import PAGE

MAX_HEADER_BYTES = 1 << 20
"""Longest header accepted; ours are under 10 KiB, so a longer one is damage or an attack."""


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Where one tensor lies in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    """absolute byte offset in the file"""

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return DTYPES[self.dtype].itemsize

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.itemsize

    @property
    def stop(self) -> int:
        """First byte after the tensor."""
        return self.start + self.num_bytes

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, a step along the first dimension."""
        return math.prod(self.shape[1:]) * self.itemsize


@dataclass(frozen=True, slots=True)
class Container:
    """A parsed or planned header."""

    places: dict[str, TensorPlace]
    metadata: dict[str, str]
    header: bytes
    """the 8 length bytes and the JSON with its padding: the file's first bytes"""
    num_bytes: int
    """size of the whole file"""


def plan_container(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str], page_aligned: str | None = None
) -> Container:
    """Lay out ``(name, dtype, shape)`` tensors in the order given; a pure function.

    The header is padded with spaces to 8 bytes, or so that tensor ``page_aligned`` starts on a 4096-byte page
    where that leaves the first tensor on a multiple of 8.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    sizes = [math.prod(shape) * DTYPES[dtype].itemsize for _, dtype, shape in tensors]
    starts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    for (name, dtype, shape), start, stop in zip(tensors, starts, starts[1:], strict=False):
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    names = [name for name, _, _ in tensors]
    before = starts[names.index(page_aligned)] if page_aligned else 1
    before, unit = (before, PAGE) if before % 8 == 0 else (0, 8)
    text += b" " * (-(8 + len(text) + before) % unit)
    data = 8 + len(text)
    places = {
        name: TensorPlace(dtype, tuple(shape), data + start)
        for (name, dtype, shape), start in zip(tensors, starts, strict=False)
    }
    return Container(places, dict(metadata), struct.pack("<Q", len(text)) + text, data + starts[-1])


def read_container(source: ByteSource) -> Container:
    """Parse and check the header of an open file; reads at most 1 MiB, allocates nothing in proportion to its claims.

    Raises:
        CacheError: anything but a whole, gapless safetensors file with dtypes of this format.
        StorageError: the read itself failed.
    """

    def bad(problem: str) -> CacheError:
        return CacheError(source.where, f"is not a valid safetensors file: {problem}")

    def read(start: int, count: int) -> bytes:
        out = np.empty(count, np.uint8)
        source.read_into(start, out)
        return out.tobytes()

    size = source.size
    if size < 8:
        raise bad(f"only {size} bytes long")
    prefix = read(0, 8)
    (length,) = struct.unpack("<Q", prefix)
    if length > MAX_HEADER_BYTES or 8 + length > size:
        raise bad(f"header of {length:,} bytes in a file of {size:,}; truncated or damaged")
    text = read(8, length)
    try:
        entries = json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise bad(f"header: {error}") from None
    if not isinstance(entries, dict):
        raise bad("header is not a JSON object")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise bad("__metadata__ is not a map of strings")
    places: dict[str, TensorPlace] = {}
    for name, entry in entries.items():
        problem, place = _place(entry, 8 + length)
        if place is None:
            raise bad(f"tensor {name!r}: {problem}")
        places[name] = place
    at = 8 + length
    for name, place in sorted(places.items(), key=lambda item: (item[1].start, item[1].num_bytes)):
        if place.start != at:
            raise bad(f"tensor {name!r} begins at byte {place.start:,}, expected {at:,} (overlap or gap)")
        at = place.stop
    if at != size:
        raise bad(f"tensors end at byte {at:,} but the file has {size:,}; truncated or extended")
    return Container(places, metadata, prefix + text, size)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _place(entry: Any, data: int) -> tuple[str, TensorPlace | None]:
    def whole(value: Any) -> bool:
        return type(value) is int and 0 <= value < 1 << 62

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return "not a {dtype, shape, data_offsets} object", None
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return f"dtype {dtype!r} is not one of {', '.join(DTYPES)}", None
    if not isinstance(shape, list) or len(shape) > 8 or not all(map(whole, shape)):
        return "shape is not a list of whole numbers", None
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(whole, offsets)):
        return "data_offsets are not two whole numbers", None
    place = TensorPlace(dtype, tuple(shape), data + offsets[0])
    if offsets[1] - offsets[0] != place.num_bytes:
        return f"data_offsets span {offsets[1] - offsets[0]:,} bytes, its dtype and shape {place.num_bytes:,}", None
    return "", place
