"""Rows are read in order from every kind of source, named by file and line when wrong, and identified by content."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cache_format.errors import InputError
from extractor.config import DataOptions
from extractor.data.dataset import BadRow, RowSource, open_source, parse_row

ROWS: list[dict[str, Any]] = [{"text": f"row {i}", "number": i} for i in range(10)]


def source(path: Path | str, limit: int | None = None, **kwargs: Any) -> RowSource:
    return open_source(DataOptions(name=str(path), **kwargs), limit)


def texts(rows: RowSource, start: int = 0, stop: int = 1000) -> list[Any]:
    return [(parse_row(raw) or {}).get("text") for raw in rows.read(start, stop).raw]


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make(kind: str, folder: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    """The same rows as a file or folder of the given kind."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "jsonl":
        return write_lines(folder / "data.jsonl", rows)
    if kind == "json":
        (folder / "data.json").write_text(json.dumps(rows))
        return folder / "data.json"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), folder / "data.parquet")
        return folder / "data.parquet"
    if kind == "folder":
        for number in range(0, len(rows), 4):
            write_lines(folder / "in" / f"part-{number}.jsonl", rows[number : number + 4])
        return folder / "in"
    assert kind == "saved"
    datasets.Dataset.from_list(rows).save_to_disk(folder / "saved")
    return folder / "saved"


KINDS = ["jsonl", "json", "parquet", "folder", "saved"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_come_in_order_from_every_kind(kind: str, streaming: bool, tmp_path: Path) -> None:
    rows = source(make(kind, tmp_path), streaming=streaming)
    assert rows.columns == ("text", "number")
    assert rows.num_rows == (None if streaming and kind != "saved" else 10)
    assert texts(rows) == [f"row {i}" for i in range(10)]
    assert texts(rows, 3, 7) == [f"row {i}" for i in range(3, 7)]
    assert texts(rows, 8, 99) == ["row 8", "row 9"]
    assert texts(rows, 20, 30) == []


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_limit_takes_the_first_rows(kind: str, streaming: bool, tmp_path: Path) -> None:
    rows = source(make(kind, tmp_path), 6, streaming=streaming)
    assert texts(rows) == [f"row {i}" for i in range(6)]


def test_rows_of_a_folder_are_named_by_their_file_and_line(tmp_path: Path) -> None:
    for streaming in (False, True):
        rows = source(make("folder", tmp_path), streaming=streaming).read(0, 10)
        assert [rows.where(n) for n in (0, 3, 4, 9)] == [
            "part-0.jsonl row 1", "part-0.jsonl row 4", "part-4.jsonl row 1", "part-8.jsonl row 2",
        ]  # fmt: skip


def test_a_folder_is_read_with_its_sub_folders_in_the_order_of_names(tmp_path: Path) -> None:
    for name, text in (("b/x.jsonl", "2"), ("a.jsonl", "1"), ("c.jsonl", "3"), (".cache/x.jsonl", "no")):
        write_lines(tmp_path / name, [{"text": text}])
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "empty.jsonl").touch()
    assert texts(source(tmp_path)) == ["1", "2", "3"]


def test_lines_are_split_at_newlines_only_and_rows_may_differ(tmp_path: Path) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "bom"}\r\n'
        + '{"text": "a\u2028b\x85cd \u65e5"}\n\n'.encode()
        + b'{"text": 5, "more": [1, {"x": null}]}\n{"text": "no newline at the end"}'
    )
    for streaming in (False, True):
        rows = source(path, streaming=streaming)
        assert texts(rows) == ["bom", "a\u2028b\x85cd \u65e5", None, 5, "no newline at the end"]
        assert rows.columns == ("text", "more")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"text": "half', "is not JSON"),
        (b'{"text": "\xff"}', "is not UTF-8"),
        (b"[1]", "is a JSON list, not an object"),
        (b"[" * 100_000, "is not JSON"),
    ],
)
def test_one_malformed_line_is_one_bad_row(line: bytes, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b'\n{"text": "fine too"}\n')
    good, bad, also_good = source(path).read(0, 3).raw
    assert parse_row(good) == {"text": "fine"}
    assert parse_row(also_good) == {"text": "fine too"}
    with pytest.raises(BadRow, match=problem):
        parse_row(bad)


@pytest.mark.parametrize(
    "content",
    [
        b'[{"text": "a"},{"text": "b"}]',
        b'[\n{"text": "a"},\n{"text": "b"}\n]\n',
        b'\xef\xbb\xbf[{"text": "a"}\n, {"text": "b"}]',
    ],
)
def test_a_list_of_objects_under_the_name_of_lines_is_read_as_one(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(content)
    assert texts(source(tmp_path / "x.jsonl")) == ["a", "b"]


def test_the_digest_is_of_the_content_wherever_it_lies(tmp_path: Path) -> None:
    first = make("folder", tmp_path / "one")
    second = tmp_path / "elsewhere"
    shutil.copytree(first, second)
    assert source(first).digest == source(second).digest == source(first, streaming=True).digest
    (second / "part-8.jsonl").rename(second / "part-9.jsonl")
    assert source(first).digest != source(second).digest


def test_a_file_replaced_under_the_same_name_and_time_is_read_anew(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", [{"text": "old"}])
    before, time = source(path), os.stat(path).st_mtime_ns
    write_lines(path, [{"text": "new"}])
    os.utime(path, ns=(time, time))
    after = source(path)
    assert texts(after) == ["new"]
    assert before.digest != after.digest


def test_names_with_glob_characters(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "data[1]*?" / "x[0].jsonl", ROWS)
    assert len(texts(source(path))) == len(texts(source(path.parent))) == 10


def test_a_saved_dataset_with_splits(tmp_path: Path) -> None:
    part = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": part, "test": part.select(range(2))}).save_to_disk(tmp_path / "d")
    assert texts(source(tmp_path / "d", split="test")) == ["row 0", "row 1"]
    assert source(tmp_path / "d", split="train").read(0, 3).where(2) == "train row 3"
    with pytest.raises(InputError, match=r"has the splits train, test; choose one with --split"):
        source(tmp_path / "d")
    with pytest.raises(InputError, match=r"--split valid: .* no such split, only train, test"):
        source(tmp_path / "d", split="valid")


def _not_there(path: Path) -> Path:
    return path / "nothing.jsonl"


def _bytes(name: str, content: bytes) -> Any:
    def write(path: Path) -> Path:
        (path / name).write_bytes(content)
        return path / name

    return write


def _pipe(path: Path) -> Path:
    os.mkfifo(path / "x.jsonl")
    return path / "x.jsonl"


def _two_kinds(path: Path) -> Path:
    make("json", path)
    make("parquet", path)
    return path


REFUSED = {
    "missing": (_not_there, {}, "nothing.jsonl: no such file"),
    "missing folder": (lambda path: path / "a" / "b" / "c", {}, "no such file or folder"),
    "hub, offline": (
        lambda path: "nobody/nothing",
        {},
        "nobody/nothing: no such local file, and as a dataset",
    ),
    "empty": (_bytes("x.jsonl", b""), {}, "x.jsonl: is empty"),
    "empty folder": (lambda path: path, {}, "holds no .jsonl, .json, .parquet file"),
    "unknown ending": (_bytes("x.csv", b"a,b"), {}, "x.csv: ends in '.csv'; a dataset file ends in"),
    "two kinds": (_two_kinds, {}, "holds .json and .parquet files"),
    "blank lines": (_bytes("x.jsonl", b"\n\n"), {}, "none of the first 2 rows is an object"),
    "malformed lines": (_bytes("x.jsonl", b"{\n{\n"), {}, r"none of the first 2 rows .*\(x.jsonl row 1 is not JSON"),
    "damaged parquet": (_bytes("x.parquet", b"PAR1 not really"), {}, "x.parquet cannot be read"),
    "damaged json": (_bytes("x.json", b'[{"a": 1}, {'), {}, "x.json .*cannot be read"),
    "no rows": (lambda path: make("parquet", path, []), {}, "has no rows"),
    "empty list": (_bytes("x.json", b"[]"), {}, "has no rows"),
    "pipe": (_pipe, {}, "x.jsonl: is a pipe or a device"),
    "split of a file": (lambda path: make("jsonl", path), {"split": "train"}, "--split train: .* leave it out"),
    "split of a saved": (lambda path: make("saved", path), {"split": "x"}, "--split x: .* without splits"),
    "revision": (lambda path: make("jsonl", path), {"data_revision": "v1"}, "--data-revision v1: .* is local"),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_at_once(case: str, streaming: bool, tmp_path: Path) -> None:
    build, options, message = REFUSED[case]
    path = build(tmp_path)
    with pytest.raises(InputError, match=message):
        source(path, streaming=streaming, **options)
