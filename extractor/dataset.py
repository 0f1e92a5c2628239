"""Rows: where they come from, how many, what identifies them, and how to say which one is wrong.

A :class:`RowSource` reads a local ``.jsonl``/``.json``/``.parquet`` file or a folder of one kind of them, a folder
made by ``save_to_disk``, or a dataset of the hub. Everything is memory-mapped (or streamed): memory does not grow with the rows.
"""

from __future__ import annotations

import errno
import glob
import json
import re
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import xxhash
from huggingface_hub import HfApi

from cache_format.errors import InputError, StorageError

RawRow = bytes | dict[str, Any]
"""One row as read: a line of a .jsonl file, not parsed yet, or a dict."""

KINDS = {".jsonl": "text", ".json": "json", ".parquet": "parquet"}
"""File ending -> builder of ``datasets``. JSON lines are read as text, so that one malformed line is one bad row."""
_ROWS_FOR_COLUMNS = 100
_HASH_BYTES = 16 << 20
_STORAGE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}


class BadRow(ValueError):
    """A row that cannot be used; the text says why, without file and row number (see :meth:`RowSource.where`)."""


def parse_row(raw: RawRow) -> dict[str, Any] | None:
    """The row as a dict; None for a blank line.

    Raises:
        BadRow: a line that is not UTF-8, not JSON or not a JSON object.
    """
    if not isinstance(raw, bytes):
        return raw
    if not raw.strip():
        return None
    try:
        row = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadRow(f"is not UTF-8: {error.reason} at byte {error.start + 1}") from error
    except (ValueError, RecursionError) as error:
        raise BadRow(f"is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise BadRow(f"is a JSON {type(row).__name__}, not an object")
    return row


@dataclass
class _Part:
    """One file (or one whole hub or saved dataset) of a source."""

    label: str
    data: datasets.Dataset | datasets.IterableDataset
    lines: bool
    """rows are unparsed lines of JSON"""

    def raw(self, row: Mapping[str, Any]) -> RawRow:
        return row["text"].encode("latin-1") if self.lines else dict(row)

    def read(self, start: int, stop: int) -> list[RawRow]:
        columns = self.data[start:stop]
        names = list(columns)
        return [self.raw(dict(zip(names, values, strict=True))) for values in zip(*columns.values(), strict=True)]


@dataclass
class RowSource:
    """The rows of a dataset in their fixed order. Made by :func:`open_rows`.

    Rows are counted from 0. Every line of a ``.jsonl`` file is a row, blank ones too (they give no sample),
    so row ``n`` of a file is line ``n + 1`` of it.
    """

    name: str
    digest: str
    """identity of the content, independent of where it lies"""
    _parts: list[_Part]
    streaming: bool = False
    num_rows: int | None = None
    """None when streaming: unknown before the end"""
    columns: list[str] = field(default_factory=list)
    """of ``.jsonl``: every key of the first 100 lines"""
    _starts: list[int] = field(default_factory=list)
    """first row of each part, as far as known"""

    def __post_init__(self) -> None:
        self._starts = [0]
        if not self.streaming:
            for part in self._parts:
                self._starts.append(self._starts[-1] + len(part.data))
            self.num_rows = self._starts.pop()
        head = self.read(0, _ROWS_FOR_COLUMNS)
        if not head:
            raise InputError(f"{self.name}: has no rows")
        self.columns = self._columns(head)

    def _columns(self, head: list[RawRow]) -> list[str]:
        columns: dict[str, None] = {}
        problems = []
        for number, raw in enumerate(head):
            try:
                columns.update(dict.fromkeys(parse_row(raw) or ()))
            except BadRow as problem:
                problems.append(f"{self.where(number)}: {problem}")
        if not columns:
            why = f" ({problems[0]})" if problems else ""
            raise InputError(f"{self.name}: none of the first {len(head)} rows is an object with columns{why}")
        return list(columns)

    def where(self, row: int) -> str:
        """``train.jsonl row 17``: file and row (the line of a ``.jsonl`` file), counted from 1."""
        part = bisect_right(self._starts, row) - 1
        return f"{self._parts[part].label} row {row - self._starts[part] + 1}"

    def read(self, start: int, stop: int) -> list[RawRow]:
        """Rows ``start`` to ``stop`` (not included), fewer at the end. A stream is read from its beginning."""
        if self.streaming:
            return list(islice(self._stream(), start, stop))
        rows: list[RawRow] = []
        for first, part in zip(self._starts, self._parts, strict=True):
            begin, end = max(start - first, 0), min(stop - first, len(part.data))
            if begin < end:
                rows += part.read(begin, end)
        return rows

    def chunks(
        self, size: int, limit: int | None = None, skip: Collection[int] = ()
    ) -> Iterator[tuple[int, int, list[RawRow]]]:
        """Every run of ``size`` rows as ``(number, first row, rows)``, but for the numbers in ``skip``.

        ``limit``: stop after that many rows.
        """
        if self.streaming:
            rows = islice(self._stream(), limit)
            number = 0
            while chunk := list(islice(rows, size)):
                if number not in skip:
                    yield number, number * size, chunk
                number += 1
            return
        total = self.total(limit) or 0
        for number, first in enumerate(range(0, total, size)):
            if number not in skip:
                yield number, first, self.read(first, min(first + size, total))

    def total(self, limit: int | None) -> int | None:
        """Rows that ``chunks(limit=limit)`` gives, None where that is not known."""
        return self.num_rows if limit is None or self.num_rows is None else min(self.num_rows, limit)

    def _stream(self) -> Iterator[RawRow]:
        self._starts = [0]
        count = 0
        for number, part in enumerate(self._parts):
            if number:
                self._starts.append(count)
            try:
                for row in part.data:
                    count += 1
                    yield part.raw(row)
            except (InputError, StorageError, GeneratorExit):
                raise
            except Exception as error:
                raise _unreadable(f"{part.label} after row {count - self._starts[-1]}", error) from error


def open_rows(
    name: str, *, split: str | None = None, data_revision: str | None = None, streaming: bool = False
) -> RowSource:
    """Open a dataset, checking everything that can be checked before work begins.

    Args:
        name: a local ``.jsonl``, ``.json`` or ``.parquet`` file, a folder of such files (one kind, sub-folders
            included), a folder made by ``save_to_disk``, or a dataset id on the hub.
        split: of a hub or saved dataset; may be left out where there is just one.
        data_revision: branch, tag or commit of a hub dataset.
        streaming: do not copy the rows to the cache of ``datasets`` first. Saved datasets are memory-mapped anyway.

    Raises:
        InputError: nothing there, nothing that can be read, or no such split.
        StorageError: the cache folder of ``datasets`` cannot be written.
    """
    path = Path(name).expanduser()
    if not path.exists():
        if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name) or path.suffix in KINDS:
            raise InputError(f"{name}: no such file or folder, and not a dataset id of the hub (owner/name)")
        return _open_hub(name, split, data_revision, streaming)
    if data_revision is not None:
        raise InputError(f"--data-revision {data_revision}: {name} is local; only hub datasets have revisions")
    if path.is_dir() and any((path / f).is_file() for f in ("dataset_dict.json", "state.json")):
        return _open_saved(path, split)
    if split is not None:
        raise InputError(f"--split {split}: {name} is read whole; leave --split out, or name the file you want")
    return _open_files(path, streaming)


def _open_files(path: Path, streaming: bool) -> RowSource:
    root, files = _data_files(path)
    hasher, parts = xxhash.xxh3_128(), []
    for file in files:
        label = file.relative_to(root).as_posix()
        file_digest = _hash_file(file)
        hasher.update(json.dumps([label, file.stat().st_size, file_digest]).encode())
        kind = KINDS[file.suffix]
        # latin-1 keeps every byte as it is: a line that is not UTF-8 is one bad row, not the end of the file.
        options: dict[str, Any] = {"encoding": "latin-1"} if kind == "text" else {}
        try:
            data = datasets.load_dataset(
                kind,
                data_files={"train": glob.escape(str(file.resolve()))},
                split="train",
                streaming=streaming,
                # Part of the cache key: datasets looks at path and time only, and would serve the rows of a file replaced.
                description=file_digest,
                **options,
            )
        except Exception as error:
            raise _unreadable(str(file), error) from error
        parts.append(_Part(label, data, kind == "text"))
    return RowSource(str(path), hasher.hexdigest(), parts, streaming)


def _data_files(path: Path) -> tuple[Path, list[Path]]:
    """The folder that names are relative to, and the files of one kind to read, sorted by that name."""
    known = ", ".join(KINDS)
    if path.is_file():
        if path.suffix not in KINDS:
            raise InputError(f"{path}: ends in {path.suffix or 'nothing'!r}; a dataset file ends in one of {known}")
        root, files = path.parent, [path]
    else:
        root = path
        files = [f for f in path.rglob("*") if f.suffix in KINDS and f.is_file()]
        files = [f for f in files if not any(part.startswith(".") for part in f.relative_to(root).parts)]
        files.sort(key=lambda f: f.relative_to(root).as_posix())
        if not files:
            raise InputError(f"{path}: holds no {known} file, and was not made by save_to_disk")
        kinds = sorted({f.suffix for f in files})
        if len(kinds) > 1:
            raise InputError(f"{path}: holds {' and '.join(kinds)} files; keep one kind in it, or name one file")
    filled = [f for f in files if f.stat().st_size]
    if not filled:
        raise InputError(f"{path}: is empty")
    return root, filled


def _open_saved(path: Path, split: str | None) -> RowSource:
    folder = path
    if (path / "dataset_dict.json").is_file():
        try:
            splits = list(json.loads((path / "dataset_dict.json").read_bytes())["splits"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path / 'dataset_dict.json'}: cannot be read: {error}") from error
        folder = path / _pick_split(str(path), split, splits)
    elif split is not None:
        raise InputError(f"--split {split}: {path} was saved as one dataset without splits; leave --split out")
    try:
        data = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise _unreadable(str(folder), error) from error
    hasher = xxhash.xxh3_128()
    for file in sorted(f for f in folder.iterdir() if f.is_file()):
        hasher.update(json.dumps([file.name, file.stat().st_size, _hash_file(file)]).encode())
    return RowSource(str(path), hasher.hexdigest(), [_Part(folder.name, data.with_format(None), False)])


def _open_hub(name: str, split: str | None, revision: str | None, streaming: bool) -> RowSource:
    try:
        commit = revision
        if revision is None or not re.fullmatch(r"[0-9a-f]{40}", revision):
            commit = HfApi().dataset_info(name, revision=revision).sha
        split = _pick_split(name, split, datasets.get_dataset_split_names(name, revision=commit))
        data = datasets.load_dataset(name, split=split, revision=commit, streaming=streaming)
    except InputError:
        raise
    except Exception as error:
        raise _unreadable(f"{name}: no such local file, and as a dataset of the hub it", error) from error
    digest = xxhash.xxh3_128(json.dumps([name, commit, split]).encode()).hexdigest()
    return RowSource(name, digest, [_Part(f"{name} ({split})", data, False)], streaming)


def _pick_split(name: str, split: str | None, splits: list[str]) -> str:
    if split is None and len(splits) == 1:
        return splits[0]
    if split is None:
        raise InputError(f"{name}: has the splits {', '.join(splits)}; choose one with --split")
    if split not in splits:
        raise InputError(f"--split {split}: {name} has no such split, only {', '.join(splits)}")
    return split


def _hash_file(path: Path) -> str:
    hasher = xxhash.xxh3_128()
    try:
        with open(path, "rb", buffering=0) as file:
            while block := file.read(_HASH_BYTES):
                hasher.update(block)
    except OSError as error:
        raise StorageError(path, "read", error) from error
    return hasher.hexdigest()


def _unreadable(what: str, error: BaseException) -> InputError | StorageError:
    """What ``datasets`` raised, for the user: its first cause, in one line."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, OSError) and cause.errno in _STORAGE_ERRNOS:
        return StorageError(cause.filename or datasets.config.HF_DATASETS_CACHE, "keep the rows for reading", cause)
    lines = str(cause).strip().splitlines() or [type(cause).__name__]
    return InputError(f"{what} cannot be read: {lines[0]}")
