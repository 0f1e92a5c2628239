"""Rows: where they come from, how many, what identifies them, and how to say which one is wrong.

A :class:`RowSource` reads one source after the other: local files, folders made by ``save_to_disk``, datasets of the
hub. Rows are memory-mapped or streamed: memory does not grow with them.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, count, islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import xxhash
from huggingface_hub import HfApi

from cache_format.errors import DFlashCacheError, InputError
from cache_format.storage.watched_file import WatchedFile
from extractor.config import DataOptions
from extractor.data.bad_row import BadRow
from extractor.data.source_files import (
    Part,
    RawRow,
    data_files,
    hash_file,
    kind_of_file,
    open_file,
    skipped_note,
    unreadable,
)

_ROWS_FOR_COLUMNS = 100
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


class StreamError(DFlashCacheError):
    """Rows stopped coming (a network, a mount): not a fault of the input, and what was prepared so far stays."""


def parse_row(raw: RawRow) -> dict[str, Any] | None:
    """The row as a dict; None for a blank line.

    Raises:
        BadRow: a line that is not UTF-8, not JSON or not a JSON object; a row of a table that is damaged.
    """
    if isinstance(raw, BadRow):
        raise raw
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


@dataclass(frozen=True, kw_only=True)
class Source:
    """One ``--data``, opened."""

    name: str
    digest: str
    """identity of the content (not of weight or limit), independent of where it lies"""
    parts: list[Part]
    streaming: bool = False
    split: str | None = None
    weight: float = 1.0
    """share of its rows that is drawn"""
    watched: tuple[WatchedFile, ...] = ()
    """the files that rows are read from while they are asked for"""
    note: str | None = None
    """what a user should know about it, such as files that are not read"""

    def drawn(self, first: int, stop: int) -> np.ndarray:
        """bool ``[stop - first]``: which of these rows of the source are drawn, by a hash of source and row number.

        The rows drawn with one weight are among those drawn with a larger one.
        """
        hashed = np.arange(first, stop, dtype=np.uint64) + np.uint64(xxhash.xxh3_64_intdigest(self.digest.encode()))
        # The finaliser of splitmix64.
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            hashed = (hashed ^ (hashed >> np.uint64(shift))) * np.uint64(factor)
        hashed ^= hashed >> np.uint64(31)
        return (hashed >> np.uint64(11)) * 2.0**-53 < self.weight

    def where(self, part: Part) -> str:
        """A part's name among several sources."""
        if part.label.startswith(self.name) or Path(self.name).name == part.label:
            return self.name
        return f"{self.name}/{part.label}"


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Consecutive rows with what is needed to use them and to name them, in this process or another."""

    first: int
    """number of the first one in the dataset, counted from 0"""
    raw: list[RawRow | None]
    """None: a row that its source's weight leaves out"""
    column_sets: tuple[tuple[int, tuple[str, ...]], ...]
    """first row and columns of each source, ascending"""
    places: tuple[tuple[int, str], ...]
    """first row and name of each file, ascending"""

    def __len__(self) -> int:
        return len(self.raw)

    def columns_of(self, row: int) -> tuple[str, ...]:
        """The columns of the source that ``row`` is from."""
        return self.column_sets[bisect_right(self.column_sets, row, key=lambda source: source[0]) - 1][1]

    def where(self, row: int) -> str:
        """``train.jsonl row 17``: file and row in it, counted from 1 (so the line, for ``.jsonl``)."""
        first, label = self.places[bisect_right(self.places, row, key=lambda place: place[0]) - 1]
        return f"{label} row {row - first + 1}"


class RowSource:
    """The rows of a dataset in their fixed order, source by source. Made by :func:`open_source`.

    Rows are counted from 0. Every line of a ``.jsonl`` file is a row, blank ones too (they give no sample),
    so row ``n`` of a file is line ``n + 1`` of it.
    """

    name: str
    digest: str
    """identity of the content and of the weights (not of the limit), independent of where it lies"""
    column_sets: tuple[tuple[str, ...], ...]
    """of each source; of ``.jsonl``: every key of the first 100 lines"""
    num_rows: int | None
    """at most the limit; None when streaming: unknown before the end"""

    def __init__(self, sources: Sequence[Source], limit: int | None):
        """``sources`` in order.

        Raises:
            InputError: one has no rows, or none among the first that has columns.
        """
        self.sources, self._limit = tuple(sources), limit
        self.name = ", ".join(s.name if s.weight == 1 else f"{s.name}:{s.weight:g}" for s in sources)
        self.digest = sources[0].digest
        if len(sources) > 1 or sources[0].weight != 1:
            contents = [[source.digest, source.weight] for source in sources]
            self.digest = xxhash.xxh3_128(json.dumps(contents).encode()).hexdigest()
        self._parts = [(number, part) for number, source in enumerate(sources) for part in source.parts]
        self._starts = [0]
        """first row of each part, as far as known"""
        self._live: Iterator[RawRow | None] | None = None
        self._position = 0
        self.num_rows = None
        if not any(source.streaming for source in sources):
            self._starts = list(accumulate((len(part.data) for _, part in self._parts), initial=0))
            end = self._starts.pop()
            self.num_rows = end if limit is None else min(limit, end)
        self.column_sets = ()
        self.column_sets = tuple(_columns(source) for source in sources)

    @property
    def columns(self) -> tuple[str, ...]:
        """Of all sources together."""
        return tuple(dict.fromkeys(column for columns in self.column_sets for column in columns))

    def read(self, start: int, stop: int) -> Rows:
        """Rows ``start`` to ``stop`` (not included), fewer at the end. Streams are quick going forwards only.

        Raises:
            StreamError: a stream broke off, or its file is no longer the one that was digested.
        """
        if self._limit is not None:
            stop = min(stop, self._limit)
        raw = self._read_stream(start, stop) if self.num_rows is None else self._read_mapped(start, stop)
        for file in (file for source in self.sources for file in source.watched):
            if file.is_changed():
                raise StreamError(
                    f"{file.path} was changed while its rows were read, so they are not those that were identified; "
                    "bring it back and run the same command again, finished parts are kept, or choose another --out"
                )
        columns = tuple((first, self.column_sets[number]) for number, first in enumerate(self.source_starts()))
        return Rows(first=start, raw=raw, column_sets=columns, places=tuple(self.places()))

    def places(self) -> list[tuple[int, str]]:
        """First row and name of each file; of a stream, of those reached so far."""
        several = len(self.sources) > 1
        return [
            (start, self.sources[number].where(part) if several else part.label)
            for start, (number, part) in zip(self._starts, self._parts, strict=False)
        ]

    def source_starts(self) -> list[int]:
        """First row of each source; of a stream, of those reached so far."""
        first_parts = [0, *accumulate(len(source.parts) for source in self.sources)]
        return [self._starts[part] for part in first_parts[:-1] if part < len(self._starts)]

    def read_to_the_end(self, num_rows: int) -> None:
        """Go on with a stream that has ``num_rows`` rows, so that all its files are known."""
        if self.num_rows is None and len(self._starts) < len(self._parts):
            self._read_stream(num_rows, num_rows + 1)

    def _read_mapped(self, start: int, stop: int) -> list[RawRow | None]:
        rows: list[RawRow | None] = []
        source_starts = self.source_starts()
        for first, (number, part) in zip(self._starts, self._parts, strict=True):
            begin, end = max(start - first, 0), min(stop - first, len(part.data))
            if begin < end:
                before = first - source_starts[number]
                rows += _if_drawn(self.sources[number], before + begin, part.read(begin, end))
        return rows

    def _read_stream(self, start: int, stop: int) -> list[RawRow | None]:
        if self._live is None or start < self._position:
            self._live, self._position = self._stream(), 0
        rows = list(islice(self._live, start - self._position, max(stop, start) - self._position))
        self._position = start + len(rows)
        return rows

    def _stream(self) -> Iterator[RawRow | None]:
        self._starts, at = [], 0
        for source in self.sources:
            of_source = 0
            for part in source.parts:
                self._starts.append(at)
                for row in _told(part, self.column_sets):
                    yield from _if_drawn(source, of_source, [row])
                    at, of_source = at + 1, of_source + 1


def _if_drawn(source: Source, first: int, rows: list[RawRow]) -> list[RawRow | None]:
    """``rows`` of a source, from its row ``first`` on, with None for those that its weight leaves out."""
    if source.weight == 1:
        return [*rows]
    drawn = source.drawn(first, first + len(rows))
    return [row if kept else None for row, kept in zip(rows, drawn, strict=True)]


def _told(part: Part, running: object) -> Iterator[RawRow]:
    """The rows of ``part``; an error says where it was met. ``running``: whether some may be prepared already."""
    rows = iter(part)
    for number in count():
        try:
            row = next(rows, None)
        except Exception as error:
            told = unreadable(f"{part.label} after row {number}", error)
            if not running:
                raise told from error
            raise StreamError(f"{told}; run the same command again, finished parts are kept") from error
        if row is None:
            return
        yield row


def _columns(source: Source) -> tuple[str, ...]:
    """Every key of the first rows, in order of appearance."""
    head: list[tuple[Part, int, RawRow]] = []
    for part in source.parts:
        wanted = _ROWS_FOR_COLUMNS - len(head)
        rows = islice(_told(part, None), wanted) if source.streaming else part.read(0, min(wanted, len(part.data)))
        head += [(part, number, row) for number, row in enumerate(rows, 1)]
        if len(head) == _ROWS_FOR_COLUMNS:
            break
    if not head:
        raise InputError(f"{source.name}: has no rows")
    columns: dict[str, None] = {}
    problem = ""
    for part, number, row in head:
        try:
            columns.update(dict.fromkeys(parse_row(row) or ()))
        except BadRow as bad:
            problem = problem or f" ({part.label} row {number} {bad})"
    if not columns:
        raise InputError(f"{source.name}: none of the first {len(head)} rows is an object with columns{problem}")
    return tuple(columns)


# -- opening ----------------------------------------------------------------------------------------------------------


def open_source(options: DataOptions | Sequence[DataOptions], limit: int | None = None) -> RowSource:
    """Open one or several sources, in order, checking everything that can be checked before work begins.

    ``name`` is a local ``.jsonl``, ``.json`` or ``.parquet`` file (the first two perhaps compressed), a folder of such
    files (one kind, sub-folders included, in the order of their names), a folder made by ``save_to_disk``, or a dataset
    id of the hub. ``split`` belongs to hub and saved datasets and may be left out where there is just one.
    ``streaming`` saves the copy of the rows that ``datasets`` keeps in its cache folder; saved datasets are
    memory-mapped either way. ``limit``: only the first rows of all together.

    Raises:
        InputError: nothing there, nothing that can be read, or no such split.
        StorageError: the cache folder of ``datasets`` cannot be written.
    """
    every = [options] if isinstance(options, DataOptions) else options
    return RowSource([_open_one(one) for one in every], limit)


def _open_one(options: DataOptions) -> Source:
    name, path = options.name, Path(options.name).expanduser()
    if not path.exists():
        if not _HUB_ID.fullmatch(name) or kind_of_file(name)[0]:
            raise InputError(f"{name}: no such file or folder, and not a dataset id of the hub (owner/name)")
        return _open_hub(options)
    for option, value in (("revision", options.data_revision), ("config", options.data_config)):
        if value is not None:
            raise InputError(f"--data-{option} {value}: {name} is local; only hub datasets have {option}s")
    if path.is_dir() and any((path / f).is_file() for f in ("dataset_dict.json", "state.json")):
        return _open_saved(path, options)
    if options.split is not None:
        raise InputError(f"--split {options.split}: {name} is read whole; leave it out, or name the file you want")
    return _open_files(path, options)


def _open_files(path: Path, options: DataOptions) -> Source:
    files = data_files(path)
    hasher, parts, watched = xxhash.xxh3_128(), [], []
    for file in files.read:
        label = file.relative_to(files.root).as_posix()
        watched.append(WatchedFile(file, hash_file))
        digest = watched[-1].digest
        hasher.update(json.dumps([label, file.stat().st_size, digest]).encode())
        parts.append(open_file(file, label, digest, options.streaming))
        if watched[-1].is_changed():
            raise InputError(f"{file}: was changed while it was read; let it be complete, then run the command again")
    return Source(
        name=str(path),
        digest=hasher.hexdigest(),
        parts=parts,
        streaming=options.streaming,
        weight=options.weight,
        # Rows that are not streamed are in the cache folder of datasets by now.
        watched=tuple(watched) if options.streaming else (),
        note=skipped_note(path, files),
    )


def _open_saved(path: Path, options: DataOptions) -> Source:
    folder, split = path, options.split
    if (path / "dataset_dict.json").is_file():
        try:
            splits = list(json.loads((path / "dataset_dict.json").read_bytes())["splits"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path / 'dataset_dict.json'}: cannot be read: {error}") from error
        folder = path / _pick("split", str(path), split, splits)
    elif split is not None:
        raise InputError(f"--split {split}: {path} was saved as one dataset without splits; leave --split out")
    try:
        data = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise unreadable(str(folder), error) from error
    hasher, watched = xxhash.xxh3_128(), []
    for file in sorted(f for f in folder.iterdir() if f.is_file()):
        watched.append(WatchedFile(file, hash_file))
        hasher.update(json.dumps([file.name, file.stat().st_size, watched[-1].digest]).encode())
    return Source(
        name=str(path),
        digest=hasher.hexdigest(),
        parts=[Part(folder.name, data)],
        split=split,
        weight=options.weight,
        watched=tuple(watched),
    )


def _open_hub(options: DataOptions) -> Source:
    name, revision, config = options.name, options.data_revision, options.data_config
    try:
        commit = revision
        if revision is None or not re.fullmatch(r"[0-9a-f]{40}", revision):
            commit = HfApi().dataset_info(name, revision=revision).sha
        configs = datasets.get_dataset_config_names(name, revision=commit)
        if config is not None or (len(configs) > 1 and "default" not in configs):
            config = _pick("data-config", name, config, configs)
        split = _pick("split", name, options.split, datasets.get_dataset_split_names(name, config, revision=commit))
        data = datasets.load_dataset(name, config, split=split, revision=commit, streaming=options.streaming)
    except InputError:
        raise
    except Exception as error:
        raise unreadable(f"{name}: no such local file, and as a dataset of the hub it", error) from error
    identity = [name, commit, split, *([] if config is None else [config])]
    return Source(
        name=name,
        digest=xxhash.xxh3_128(json.dumps(identity).encode()).hexdigest(),
        parts=[Part(f"{name} ({split})", data)],
        streaming=options.streaming,
        split=split,
        weight=options.weight,
    )


def _pick(option: str, name: str, wanted: str | None, there: list[str]) -> str:
    """The split or configuration that was asked for, or the only one."""
    kind = option.removeprefix("data-")
    if wanted is None and len(there) == 1:
        return there[0]
    if wanted is None:
        raise InputError(f"{name}: has the {kind}s {', '.join(there)}; choose one with --{option}")
    if wanted not in there:
        raise InputError(f"--{option} {wanted}: {name} has no such {kind}, only {', '.join(there)}")
    return wanted
