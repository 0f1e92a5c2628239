"""Rows: where they come from, how many, what identifies them, and how to say which one is wrong.

A :class:`RowSource` reads a local ``.jsonl``/``.json``/``.parquet`` file or a folder of one kind of them, a folder
made by ``save_to_disk``, or a dataset of the hub. Rows are memory-mapped or streamed: memory does not grow with them.
"""

from __future__ import annotations

import errno
import glob
import json
import re
from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, count, islice
from pathlib import Path
from typing import Any

import datasets
import xxhash
from huggingface_hub import HfApi

from cache_format.errors import DFlashCacheError, InputError, StorageError
from cache_format.storage.watched_file import WatchedFile
from extractor.config import DataOptions
from extractor.data.arrow_rows import rows_of
from extractor.data.bad_row import BadRow

RawRow = bytes | dict[str, Any]
"""One row as read: a line of a .jsonl file, not parsed yet, or a dict."""

KINDS = {".jsonl": "text", ".json": "json", ".parquet": "parquet"}
"""File ending -> builder of ``datasets``. JSON lines are read as text, so that one malformed line is one bad row."""
_ROWS_FOR_COLUMNS = 100
_HASH_BYTES = 16 << 20
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_STORAGE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}


class StreamError(DFlashCacheError):
    """Rows stopped coming (a network, a mount): not a fault of the input, and what was prepared so far stays."""


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

    def read(self, start: int, stop: int) -> list[RawRow]:
        if self.lines:
            return [line.encode("latin-1") for line in self.data[start:stop]["text"]]
        return [*rows_of(self.data.with_format("arrow")[start:stop])]

    def __iter__(self) -> Iterator[RawRow]:
        """The rows as they come. Tables, not decoded rows: nothing opens an image that a row happens to hold."""
        if self.lines:
            yield from (row["text"].encode("latin-1") for row in self.data)
        else:
            for table in self.data.with_format("arrow").iter(_ROWS_FOR_COLUMNS):
                yield from rows_of(table)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Consecutive rows with what is needed to use them and to name them, in this process or another."""

    first: int
    """number of the first one in the dataset, counted from 0"""
    raw: list[RawRow]
    columns: tuple[str, ...]
    """of the whole dataset"""
    places: tuple[tuple[int, str], ...]
    """first row and name of each file, ascending"""

    def __len__(self) -> int:
        return len(self.raw)

    def where(self, row: int) -> str:
        """``train.jsonl row 17``: file and row in it, counted from 1 (so the line, for ``.jsonl``)."""
        first, label = self.places[bisect_right(self.places, row, key=lambda place: place[0]) - 1]
        return f"{label} row {row - first + 1}"


class RowSource:
    """The rows of a dataset in their fixed order. Made by :func:`open_source`.

    Rows are counted from 0. Every line of a ``.jsonl`` file is a row, blank ones too (they give no sample),
    so row ``n`` of a file is line ``n + 1`` of it.
    """

    name: str
    digest: str
    """identity of the content (not of the limit), independent of where it lies"""
    columns: tuple[str, ...]
    """of ``.jsonl``: every key of the first 100 lines"""
    num_rows: int | None
    """at most the limit; None when streaming: unknown before the end"""

    def __init__(
        self,
        name: str,
        digest: str,
        parts: list[_Part],
        streaming: bool,
        limit: int | None,
        watched: Sequence[WatchedFile] = (),
    ):
        """``parts`` in order; ``watched``: the files that rows are read from while they are asked for.

        Raises:
            InputError: no rows, or none among the first that has columns.
        """
        self.name, self.digest, self._watched = name, digest, watched
        self._parts, self._limit = parts, limit
        self._places = [(0, parts[0].label)]
        self._live: Iterator[RawRow] | None = None
        self._position = 0
        self.num_rows = None
        if not streaming:
            starts = list(accumulate((len(part.data) for part in parts), initial=0))
            self._places = [(start, part.label) for start, part in zip(starts, parts, strict=False)]
            self.num_rows = starts[-1] if limit is None else min(limit, starts[-1])
        self.columns = ()
        self.columns = _columns(name, self.read(0, _ROWS_FOR_COLUMNS))

    def read(self, start: int, stop: int) -> Rows:
        """Rows ``start`` to ``stop`` (not included), fewer at the end. Streams are quick going forwards only.

        Raises:
            StreamError: a stream broke off, or its file is no longer the one that was digested.
        """
        if self._limit is not None:
            stop = min(stop, self._limit)
        raw = self._read_stream(start, stop) if self.num_rows is None else self._read_mapped(start, stop)
        for file in self._watched:
            if file.is_changed():
                raise StreamError(
                    f"{file.path} was changed while its rows were read, so they are not those that were identified; "
                    "bring it back and run the same command again, finished parts are kept, or choose another --out"
                )
        return Rows(first=start, raw=raw, columns=self.columns, places=tuple(self._places))

    def chunks(self, size: int, skip: Collection[int] = ()) -> Iterator[tuple[int, Rows]]:
        """Every run of ``size`` rows with its number, but for the numbers in ``skip``."""
        for number in count():
            if self.num_rows is not None and number * size >= self.num_rows:
                return
            if number not in skip:
                rows = self.read(number * size, (number + 1) * size)
                if not rows:
                    return
                yield number, rows

    def _read_mapped(self, start: int, stop: int) -> list[RawRow]:
        rows: list[RawRow] = []
        for (first, _), part in zip(self._places, self._parts, strict=True):
            begin, end = max(start - first, 0), min(stop - first, len(part.data))
            if begin < end:
                rows += part.read(begin, end)
        return rows

    def _read_stream(self, start: int, stop: int) -> list[RawRow]:
        if self._live is None or start < self._position:
            self._live, self._position = self._stream(), 0
        rows = list(islice(self._live, start - self._position, max(stop, start) - self._position))
        self._position = start + len(rows)
        return rows

    def _stream(self) -> Iterator[RawRow]:
        self._places, at = [], 0
        for part in self._parts:
            self._places.append((at, part.label))
            rows = iter(part)
            while True:
                try:
                    row = next(rows, None)
                except Exception as error:
                    told = _unreadable(f"{part.label} after row {at - self._places[-1][0]}", error)
                    if not self.columns:
                        raise told from error
                    raise StreamError(f"{told}; run the same command again, finished parts are kept") from error
                if row is None:
                    break
                at += 1
                yield row


def _columns(name: str, head: Rows) -> tuple[str, ...]:
    """Every key of the first rows, in order of appearance."""
    if not head:
        raise InputError(f"{name}: has no rows")
    columns: dict[str, None] = {}
    problem = ""
    for number, raw in enumerate(head.raw):
        try:
            columns.update(dict.fromkeys(parse_row(raw) or ()))
        except BadRow as bad:
            problem = problem or f" ({head.where(number)} {bad})"
    if not columns:
        raise InputError(f"{name}: none of the first {len(head)} rows is an object with columns{problem}")
    return tuple(columns)


def open_source(options: DataOptions, limit: int | None = None) -> RowSource:
    """Open a dataset, checking everything that can be checked before work begins.

    ``options.name`` is a local ``.jsonl``, ``.json`` or ``.parquet`` file, a folder of such files (one kind,
    sub-folders included, in the order of their names), a folder made by ``save_to_disk``, or a dataset id of the hub.
    ``options.split`` belongs to hub and saved datasets and may be left out where there is just one.
    ``options.streaming`` saves the copy of the rows that ``datasets`` keeps in its cache folder; saved datasets are
    memory-mapped either way. ``limit``: only the first rows.

    Raises:
        InputError: nothing there, nothing that can be read, or no such split.
        StorageError: the cache folder of ``datasets`` cannot be written.
    """
    name, path = options.name, Path(options.name).expanduser()
    if not path.exists():
        if not _HUB_ID.fullmatch(name) or path.suffix in KINDS:
            raise InputError(f"{name}: no such file or folder, and not a dataset id of the hub (owner/name)")
        return _open_hub(options, limit)
    if options.data_revision is not None:
        raise InputError(f"--data-revision {options.data_revision}: {name} is local; only hub datasets have revisions")
    if path.is_dir() and any((path / f).is_file() for f in ("dataset_dict.json", "state.json")):
        return _open_saved(path, options.split, limit)
    if options.split is not None:
        raise InputError(f"--split {options.split}: {name} is read whole; leave it out, or name the file you want")
    return _open_files(path, options.streaming, limit)


def _open_files(path: Path, streaming: bool, limit: int | None) -> RowSource:
    root, files = _data_files(path)
    hasher, parts, watched = xxhash.xxh3_128(), [], []
    for file in files:
        label = file.relative_to(root).as_posix()
        watched.append(WatchedFile(file, _hash_file))
        file_digest = watched[-1].digest
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
                # Makes the content part of the cache key: datasets looks at path and time, and could serve old rows.
                description=file_digest,
                **options,
            )
        except Exception as error:
            raise _unreadable(str(file), error) from error
        if watched[-1].is_changed():
            raise InputError(f"{file}: was changed while it was read; let it be complete, then run the command again")
        parts.append(_Part(label, data, kind == "text"))
    # Rows that are not streamed are in the cache folder of datasets by now.
    return RowSource(str(path), hasher.hexdigest(), parts, streaming, limit, watched if streaming else ())


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


def _open_saved(path: Path, split: str | None, limit: int | None) -> RowSource:
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
    hasher, watched = xxhash.xxh3_128(), []
    for file in sorted(f for f in folder.iterdir() if f.is_file()):
        watched.append(WatchedFile(file, _hash_file))
        hasher.update(json.dumps([file.name, file.stat().st_size, watched[-1].digest]).encode())
    parts = [_Part(folder.name, data, False)]
    return RowSource(str(path), hasher.hexdigest(), parts, False, limit, watched)


def _open_hub(options: DataOptions, limit: int | None) -> RowSource:
    name, revision, split = options.name, options.data_revision, options.split
    try:
        commit = revision
        if revision is None or not re.fullmatch(r"[0-9a-f]{40}", revision):
            commit = HfApi().dataset_info(name, revision=revision).sha
        split = _pick_split(name, split, datasets.get_dataset_split_names(name, revision=commit))
        data = datasets.load_dataset(name, split=split, revision=commit, streaming=options.streaming)
    except InputError:
        raise
    except Exception as error:
        raise _unreadable(f"{name}: no such local file, and as a dataset of the hub it", error) from error
    digest = xxhash.xxh3_128(json.dumps([name, commit, split]).encode()).hexdigest()
    return RowSource(name, digest, [_Part(f"{name} ({split})", data, False)], options.streaming, limit)


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
