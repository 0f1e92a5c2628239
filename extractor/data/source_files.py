"""Local data files: which of a folder are read, what is inside them, and what to do with others.

A file of JSON lines, of JSON, or a parquet table; the first two may be compressed. ``datasets`` keeps a copy of the
rows of each in its cache folder, memory-mapped, unless they are streamed.
"""

from __future__ import annotations

import bz2
import codecs
import errno
import glob
import gzip
import json
import mmap
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import xxhash
import zstandard

from cache_format.errors import InputError, StorageError
from extractor.data.arrow_rows import rows_of
from extractor.data.bad_row import BadRow
from extractor.data.json_values import json_values

RawRow = bytes | dict[str, Any] | BadRow
"""One row as read: a line or value of JSON, not parsed yet, or a dict; of a table, why it cannot be one, too."""

KINDS = {".jsonl": "lines", ".ndjson": "lines", ".jsonlines": "lines", ".json": "json", ".parquet": "table"}
COMPRESSED = (".gz", ".zst", ".bz2")
_DECOMPRESSED: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open}
_BLOCK = 1 << 20
_HASH_BYTES = 16 << 20
_TABLE_ROWS = 100
_LIST_OF_OBJECTS = re.compile(rb"\s*\[\s*(\{|\Z)")
_NO_ROWS = ("corresponds to no data", "BatchSize must be greater than 0")
"""of what ``datasets`` says of a .json list and a .parquet file without rows"""
_STORAGE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}
_NAMES_TOLD = 8
_TO_JSONL = "datasets.load_dataset({kind!r}, data_files={name!r}, split='train').to_json('rows.jsonl')"


@dataclass(frozen=True)
class Part:
    """One file (or one whole hub or saved dataset) of a source, opened."""

    label: str
    data: datasets.Dataset | datasets.IterableDataset
    column: str | None = None
    """the one that holds unparsed JSON; None: the columns are the row's"""

    def read(self, start: int, stop: int) -> list[RawRow]:
        """Rows ``start`` to ``stop`` (not included) of a part that is not streamed."""
        if self.column is None:
            return [*rows_of(self.data.with_format("arrow")[start:stop])]
        return [_as_bytes(row) for row in self.data[start:stop][self.column]]

    def __iter__(self) -> Iterator[RawRow]:
        """The rows as they come. Tables, not decoded rows: nothing opens an image that a row happens to hold."""
        if self.column is None:
            for table in self.data.with_format("arrow").iter(_TABLE_ROWS):
                yield from rows_of(table)
        else:
            yield from (_as_bytes(row[self.column]) for row in self.data)


@dataclass(frozen=True)
class Files:
    """The files that a path stands for."""

    root: Path
    """what their names are relative to"""
    read: list[Path]
    skipped: list[str]
    """names of what lies there too"""


def open_file(file: Path, label: str, digest: str, streaming: bool) -> Part:
    """Open one file; ``digest`` is that of its bytes.

    Raises:
        InputError: nothing that can be read.
        StorageError: the cache folder of ``datasets`` cannot be written.
    """
    kind, compression = kind_of_file(file.name)
    # Makes the content part of the cache key: datasets looks at path and time, and could serve old rows.
    plain: dict[str, Any] = {"data_files": {"train": glob.escape(str(file.resolve()))}, "description": digest}
    try:
        if kind == "table":
            return Part(label, datasets.load_dataset("parquet", **plain, split="train", streaming=streaming))
        if kind == "json" and _is_lines(file, compression):
            kind = "lines"
        elif kind == "lines" and _is_list(file, compression):
            kind = "json"
        if kind == "lines" and not compression:
            # latin-1 keeps every byte as it is: a line that is not UTF-8 is one bad row, not the end of the file.
            lines = datasets.load_dataset("text", **plain, split="train", streaming=streaming, encoding="latin-1")
            return Part(label, lines, "text")
        made = datasets.IterableDataset if streaming else datasets.Dataset
        arguments = {"path": str(file.resolve()), "kind": kind, "compression": compression, "digest": digest}
        features = datasets.Features({"row": datasets.Value("binary")})
        return Part(label, made.from_generator(_generated, features=features, gen_kwargs=arguments), "row")
    except Exception as error:
        raise unreadable(str(file), error) from error


def data_files(path: Path) -> Files:
    """The files to read at ``path``: itself, or those of one kind below it, sorted by name.

    Raises:
        InputError: none, of several kinds, or the same one twice.
    """
    known = ".jsonl, .json, .parquet"
    if not path.is_file() and not path.is_dir():
        raise InputError(f"{path}: is a pipe or a device, which can be read only once; write the rows to a file")
    if path.is_file():
        if kind_of_file(path.name)[0] is None:
            ending = path.suffix or "nothing"
            raise InputError(f"{path}: ends in {ending!r}; a dataset file ends in one of {known}. {_way_out(path)}")
        files = Files(path.parent, [path], [])
    else:
        files = _files_below(path)
        if not files.read:
            others = [path / name for name in files.skipped if _way_out(path / name)]
            way_out = f". {_way_out(others[0])}" if others else ""
            found = f"; found: {_listed(files.skipped)}" if files.skipped else ""
            raise InputError(f"{path}: holds no {known} file, and was not made by save_to_disk{found}{way_out}")
        kinds = {kind_of_file(file.name)[0] for file in files.read}
        if len(kinds) > 1:
            endings = sorted({_ending(file.name) for file in files.read})
            raise InputError(f"{path}: holds {' and '.join(endings)} files; keep one kind in it, or name one file")
        twice = Counter(_uncompressed(f.relative_to(path).as_posix()) for f in files.read).most_common(1)[0]
        if twice[1] > 1:
            raise InputError(
                f"{path}: holds {twice[0]} both compressed and not, or compressed in two ways; keep one of them"
            )
    filled = [file for file in files.read if file.stat().st_size]
    if not filled:
        raise InputError(f"{path}: is empty")
    empty = [file.relative_to(files.root).as_posix() for file in files.read if file not in filled]
    return Files(files.root, filled, [*files.skipped, *(f"{name} (empty)" for name in empty)])


def skipped_note(path: Path, files: Files) -> str | None:
    """For a person: what of a folder is not read."""
    return f"{path}: not read: {_listed(files.skipped)}" if files.skipped else None


def kind_of_file(name: str) -> tuple[str | None, str]:
    """(what is inside a file of this name, how it is compressed): ``("lines", ".gz")``; None for what is not read."""
    lower = name.lower()
    compression = next((ending for ending in COMPRESSED if lower.endswith(ending)), "")
    kind = KINDS.get(Path(_uncompressed(lower)).suffix)
    return (None, compression) if kind == "table" and compression else (kind, compression)


def hash_file(path: Path) -> str:
    """xxh3_128 of a file's bytes."""
    hasher = xxhash.xxh3_128()
    try:
        with open(path, "rb", buffering=0) as file:
            while block := file.read(_HASH_BYTES):
                hasher.update(block)
    except OSError as error:
        raise StorageError(path, "read", error) from error
    return hasher.hexdigest()


def unreadable(what: str, error: BaseException) -> InputError | StorageError:
    """What ``datasets`` raised, for the user: its first cause, in one line."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, OSError) and cause.errno in _STORAGE_ERRNOS:
        return StorageError(cause.filename or datasets.config.HF_DATASETS_CACHE, "keep the rows for reading", cause)
    lines = str(cause).strip().splitlines() or [type(cause).__name__]
    if any(words in lines[0] for words in _NO_ROWS):
        return InputError(f"{what}: has no rows")
    return InputError(f"{what} cannot be read: {lines[0]}")


# -- which files ------------------------------------------------------------------------------------------------------


def _files_below(path: Path) -> Files:
    read, skipped = [], []
    for file in sorted(path.rglob("*"), key=lambda f: f.relative_to(path).as_posix()):
        name = file.relative_to(path).as_posix()
        if any(part.startswith(".") for part in Path(name).parts):
            continue
        if file.is_dir():
            if file.is_symlink():
                skipped.append(f"{name} (a link to a folder)")
        elif not file.is_file():
            skipped.append(f"{name} (a link to nothing)" if file.is_symlink() else name)
        elif kind_of_file(file.name)[0] is None:
            skipped.append(name)
        else:
            read.append(file)
    return Files(path, read, skipped)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMES_TOLD} more" if len(names) > _NAMES_TOLD else ""
    return f"{', '.join(names[:_NAMES_TOLD])}{more}"


def _ending(name: str) -> str:
    return Path(_uncompressed(name.lower())).suffix


def _uncompressed(name: str) -> str:
    return next((name[: -len(ending)] for ending in COMPRESSED if name.lower().endswith(ending)), name)


def _way_out(path: Path) -> str:
    """What to do with a file that is not read; "" where that is not clear."""
    name, ending = path.name, path.suffix.lower()
    if _ending(name) == ".parquet":
        return "A parquet file compresses itself: decompress it"
    if ending in COMPRESSED:
        return "A compressed file has to be called .jsonl or .json before that, such as rows.jsonl.gz"
    if ending in (".csv", ".tsv"):
        extra = ", sep='\\t'" if ending == ".tsv" else ""
        call = _TO_JSONL.format(kind="csv", name=name).replace(", split", f"{extra}, split")
        return f"Convert it, in Python: {call}; or, so that texts stay texts, with pandas.read_csv(..., dtype=str)"
    if ending == ".txt":
        return f"Convert it (a line a row of text), in Python: {_TO_JSONL.format(kind='text', name=name)}"
    if ending == ".arrow":
        return f"Convert it, in Python: datasets.Dataset.from_file({name!r}).to_parquet('rows.parquet')"
    if ending in (".xz", ".lzma", ".lz4", ".zip", ".tar", ".tgz", ".7z", ".rar", ".br"):
        return f"Unpack it; of compressed files {', '.join(COMPRESSED)} are read"
    if ending in (".xlsx", ".xls", ".ods", ".feather", ".orc", ".avro", ".yaml", ".yml", ".xml", ".db", ".sqlite"):
        return "Convert it to a .jsonl file: a JSON object a line, such as with pandas' to_json('rows.jsonl', " + (
            "orient='records', lines=True)"
        )
    if ending in (".pt", ".pth", ".pkl", ".pickle", ".npy", ".npz", ".bin", ".safetensors"):
        return "Rows of ids go into a .parquet file with input_ids and loss_mask or labels"
    return ""


# -- what is inside ---------------------------------------------------------------------------------------------------


def _as_bytes(row: str | bytes) -> bytes:
    return row if isinstance(row, bytes) else row.encode("latin-1")


def _is_lines(file: Path, compression: str) -> bool:
    """Whether a .json file holds JSON lines: its first line that is not blank is an object by itself."""
    first = next((line for line in _lines(_blocks(file, compression)) if line.strip()), b"")
    try:
        return isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _is_list(file: Path, compression: str) -> bool:
    """Whether a .jsonl file holds one JSON list of objects, as a .json file does."""
    lines = (line for line in _lines(_blocks(file, compression)) if line.strip())
    first = next(lines, b"").removeprefix(codecs.BOM_UTF8)
    if not _LIST_OF_OBJECTS.match(first):
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return True
    return next(lines, None) is None


def _generated(path: str, kind: str, compression: str, digest: str) -> Iterator[dict[str, bytes]]:
    """The rows of a file for ``datasets``; ``digest`` is there for its cache key."""
    rows = _lines(_blocks(Path(path), compression)) if kind == "lines" else _values(Path(path), compression)
    for row in rows:
        yield {"row": row}


def _values(path: Path, compression: str) -> Iterator[bytes]:
    if compression:
        yield from json_values(b"".join(_blocks(path, compression)))
        return
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield from json_values(data)


def _lines(blocks: Iterator[bytes]) -> Iterator[bytes]:
    rest: list[bytes] = []
    for block in blocks:
        first, *others = block.split(b"\n")
        rest.append(first)
        for other in others:
            yield b"".join(rest)
            rest = [other]
    if last := b"".join(rest):
        yield last


def _blocks(path: Path, compression: str) -> Iterator[bytes]:
    """A file's content, decompressed.

    Raises:
        ValueError: it is cut off or damaged.
    """
    try:
        with open(path, "rb") as file, _DECOMPRESSED.get(compression, nullcontext)(file) as plain:
            if compression == ".zst":
                yield from _zstd_blocks(file)
            else:
                yield from iter(lambda: plain.read(_BLOCK), b"")
    except (EOFError, zstandard.ZstdError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"it is damaged or cut off: {error}") from None


def _zstd_blocks(file: Any) -> Iterator[bytes]:
    frame = zstandard.ZstdDecompressor().decompressobj()
    while block := file.read(_BLOCK):
        while block:
            if frame.eof:
                frame = zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(block)
            block = frame.unused_data if frame.eof else b""
    if not frame.eof:
        raise EOFError("the last frame does not end")
