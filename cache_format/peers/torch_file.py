"""The plain tensors of a file of torch.save, without unpickling it.

Such a file is a zip of stored (not compressed) entries: ``NAME/data.pkl``, a pickle that describes an object, and
``NAME/data/KEY``, the bytes of its tensors. A pickle is a program; this reads the few instructions that a dict of
tensors, numbers and texts takes, and refuses all others: nothing that the file names is imported or called.
"""

from __future__ import annotations

import math
import os
import pickletools
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache_format.errors import CacheError
from cache_format.storage.byte_source import LocalFile
from cache_format.storage.paths import open_for_reading

MAX_PICKLE_BYTES = 1 << 20
"""Those of a dict of a few tensors have some hundred."""

_STORAGES = {
    "FloatStorage": torch.float32,
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


@dataclass(frozen=True, slots=True)
class _Name:
    """``module name``: what a pickle would import."""

    full: str


@dataclass(frozen=True, slots=True)
class _Storage:
    """The bytes of one or more tensors."""

    dtype: torch.dtype
    key: str
    count: int
    """elements"""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies, and how."""

    storage: _Storage
    offset: int
    """elements of the storage before it"""
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def __post_init__(self) -> None:
        numbers = (self.offset, *self.shape, *self.stride)
        if not all(type(n) is int and 0 <= n < 1 << 60 for n in numbers) or len(self.shape) != len(self.stride):
            raise ValueError("a tensor's shape and strides are not whole numbers")
        # No element twice: a tensor then takes no more memory than the file has bytes for it.
        if self.offset + self.span > self.storage.count or math.prod(self.shape) > max(self.span, 0):
            raise ValueError("a tensor is larger than its storage")

    @property
    def span(self) -> int:
        """Elements of the storage from its first to its last."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))


class TorchFile:
    """A file of torch.save, open; ``record`` is the dict that it holds, tensors as :class:`StoredTensor`."""

    def __init__(self, path: Path):
        """
        Raises:
            CacheError: another file than described above, damaged, or one that holds more than plain tensors.
        """
        self._file = LocalFile(path)
        try:
            self._places, pickle = _entries(path)
            self.record = _as_record(_value_of(pickle))
            for value in self.record.values():
                if isinstance(value, StoredTensor):
                    self._require_there(value.storage)
        except (zipfile.BadZipFile, RuntimeError, EOFError, struct.error, OSError, *_OF_A_PICKLE) as error:
            self._file.close()
            raise CacheError(path, f"cannot be read as a dict of plain tensors saved by torch.save: {error}") from None
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> TorchFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def tensor(self, name: str) -> Tensor:
        """Read one, in memory of its own.

        Raises:
            CacheError: there is none of that name, or the file has become shorter.
        """
        stored = self.record.get(name)
        if not isinstance(stored, StoredTensor):
            raise CacheError(self._file.where, f"has no tensor {name!r}, only {', '.join(map(repr, self.record))}")
        dtype = stored.storage.dtype
        data = np.empty(stored.span * dtype.itemsize, np.uint8)
        self._file.read_into(self._places[stored.storage.key][0] + stored.offset * dtype.itemsize, data)
        flat = torch.from_numpy(data).view(dtype) if len(data) else torch.empty(0, dtype=dtype)
        return torch.as_strided(flat, stored.shape, stored.stride).contiguous()

    def _require_there(self, storage: _Storage) -> None:
        start, size = self._places.get(storage.key, (0, -1))
        if size != storage.count * storage.dtype.itemsize or start + size > self._file.size:
            raise ValueError(f"the bytes of storage {storage.key!r} are not there")


def _entries(path: Path) -> tuple[dict[str, tuple[int, int]], bytes]:
    """Key of each storage -> offset in the file and bytes; and the pickle."""
    with closing(os.fdopen(open_for_reading(path), "rb")) as file, zipfile.ZipFile(file) as archive:
        infos = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in infos if name.endswith("/data.pkl")]
        if len(pickles) != 1 or any(info.compress_type != zipfile.ZIP_STORED for info in infos.values()):
            raise ValueError("it is another kind of zip file")
        root = pickles[0].removesuffix("data.pkl")
        if infos[pickles[0]].file_size > MAX_PICKLE_BYTES:
            raise ValueError("its description is too long for one")
        order = infos.get(f"{root}byteorder")
        if order is not None and archive.read(order) != b"little":
            raise ValueError("it was saved on a big-endian machine")
        pickle = archive.read(pickles[0])
        places = {}
        for name, info in infos.items():
            if name.startswith(f"{root}data/"):
                file.seek(info.header_offset + 26)
                name_bytes, extra_bytes = struct.unpack("<HH", file.read(4))
                start = info.header_offset + 30 + name_bytes + extra_bytes
                places[name.removeprefix(f"{root}data/")] = (start, info.file_size)
    return places, pickle


_OF_A_PICKLE = (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError)
"""What walking a damaged pickle raises."""

_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_TUPLE": tuple, "EMPTY_LIST": list}
_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _value_of(pickle: bytes) -> Any:
    """What a pickle of plain tensors describes.

    Raises:
        ValueError, IndexError, KeyError, TypeError: it is damaged, or describes more.
    """
    stack: list[Any] = []
    memo: dict[Any, Any] = {}
    for operation, argument, _ in pickletools.genops(pickle):
        name = operation.name
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name == "MARK":
            stack.append(_MARK)
        elif name in _TUPLES:
            stack[-_TUPLES[name] :] = [tuple(stack[-_TUPLES[name] :])]
        elif name == "TUPLE":
            stack.append(tuple(_since_mark(stack)))
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "GLOBAL":
            stack.append(_Name(str(argument)))
        elif name == "BINPERSID":
            stack.append(_storage(stack.pop()))
        elif name == "REDUCE":
            arguments = stack.pop()
            stack.append(_made(stack.pop(), arguments))
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            _set(stack[-1], [key, value])
        elif name == "SETITEMS":
            items = _since_mark(stack)
            _set(stack[-1], items)
        elif name == "APPEND":
            item = stack.pop()
            _extend(stack[-1], [item])
        elif name == "APPENDS":
            more = _since_mark(stack)
            _extend(stack[-1], more)
        elif name == "STOP":
            return stack.pop()
        elif name != "PROTO":
            raise ValueError(f"instruction {name} is not one of a dict of plain tensors")
    raise ValueError("its description has no end")


def _since_mark(stack: list[Any]) -> list[Any]:
    at = max(i for i, value in enumerate(stack) if value is _MARK)
    found = stack[at + 1 :]
    del stack[at:]
    return found


def _set(into: Any, items: list[Any]) -> None:
    if not isinstance(into, dict):
        raise ValueError("items are set in what is no dict")
    for key, value in _pairs(items):
        if not isinstance(key, str):
            raise ValueError("a key is not text")
        into[key] = value


def _pairs(items: list[Any]) -> Iterator[tuple[Any, Any]]:
    return zip(items[::2], items[1::2], strict=True)


def _extend(into: Any, items: list[Any]) -> None:
    if not isinstance(into, list):
        raise ValueError("something is appended to what is no list")
    into += items


def _storage(told: Any) -> _Storage:
    kind, name, key, _, count = told
    if kind != "storage" or not isinstance(name, _Name) or not isinstance(key, str) or type(count) is not int:
        raise ValueError("a storage is not described as one")
    module, _, storage = name.full.partition(" ")
    if module != "torch" or storage not in _STORAGES or not 0 <= count < 1 << 60:
        raise ValueError(f"storage {name.full!r} is not one of plain numbers")
    return _Storage(_STORAGES[storage], key, count)


def _made(name: Any, arguments: Any) -> Any:
    if name == _Name("torch._utils _rebuild_tensor_v2"):
        storage, offset, shape, stride = arguments[:4]
        if not isinstance(storage, _Storage) or any(arguments[6:]):
            raise ValueError("a tensor has no storage, or its elements are not what is stored (negated)")
        return StoredTensor(storage, offset, shape, stride)
    if name == _Name("collections OrderedDict") and not arguments:
        return {}
    raise ValueError(f"it holds more than plain tensors ({getattr(name, 'full', 'something to be called')})")


def _as_record(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, not a dict")
    return value
