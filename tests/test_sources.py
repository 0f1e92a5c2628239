"""Files in the kinds that people have, several sources with weights and splits, and what each sample came from."""

from __future__ import annotations

import bz2
import gzip
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from cache_format.errors import InputError
from extractor.cli.extract_options import extract_options
from extractor.config import DataOptions, parse_data
from extractor.data import dataset as dataset_module
from extractor.data.conversation import conversation_of
from extractor.data.dataset import RowSource, open_source, parse_row
from extractor.data.forms import form_of
from extractor.data.json_values import json_values

ROWS: list[dict[str, Any]] = [{"text": f"row {i}", "when": "2024-05-01T12:00:00Z", "more": None} for i in range(10)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
COMPRESS = {".gz": gzip.compress, ".zst": zstandard.compress, ".bz2": bz2.compress, "": bytes}


def opened(*names: Any, limit: int | None = None, **options: Any) -> RowSource:
    return open_source([DataOptions(name=str(name), **options) for name in names], limit)


def parsed(rows: RowSource) -> list[Any]:
    return [None if raw is None else parse_row(raw) for raw in rows.read(0, 1000).raw]


def write(path: Path, content: bytes | list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = content if isinstance(content, bytes) else "".join(json.dumps(r) + "\n" for r in content).encode()
    path.write_bytes(lines)
    return path


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl", LINES),
        ("x.NDJSON", LINES),
        ("x.json", LINES),
        ("list.json", json.dumps(ROWS).encode()),
        ("pretty.json", json.dumps(ROWS, indent=2).encode()),
        ("objects.json", "\n".join(json.dumps(row, indent=2) for row in ROWS).encode()),
    ],
)
def test_json_of_every_kind_gives_the_rows_as_they_are(
    name: str, content: bytes, ending: str, streaming: bool, tmp_path: Path
) -> None:
    """Nulls are kept, what looks like a date stays a text, and a row is named by its place."""
    path = write(tmp_path / f"{name}{ending}", COMPRESS[ending](content))
    rows = opened(path, streaming=streaming)
    assert parsed(rows) == ROWS
    assert rows.read(3, 5).where(4) == f"{path.name} row 5"


@pytest.mark.parametrize("ending", [".gz", ".zst", ".bz2"])
def test_a_compressed_file_may_be_several_one_after_the_other(ending: str, tmp_path: Path) -> None:
    half = COMPRESS[ending](LINES)
    assert parsed(opened(write(tmp_path / f"x.jsonl{ending}", half + half))) == ROWS * 2


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("ending", [".gz", ".zst", ".bz2"])
def test_a_compressed_file_that_is_cut_off_never_looks_whole(ending: str, streaming: bool, tmp_path: Path) -> None:
    content = COMPRESS[ending](os.urandom(40_000).hex().encode() + b"\n" + LINES)
    path = write(tmp_path / f"x.jsonl{ending}", content[: len(content) // 2])
    with pytest.raises(InputError, match=r"x.jsonl.* cannot be read: it is damaged or cut off"):
        parsed(opened(path, streaming=streaming))


def test_a_compressed_file_replaced_under_the_same_name_and_time_is_read_anew(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl.gz", gzip.compress(LINES))
    before, time = opened(path), os.stat(path).st_mtime_ns
    write(path, gzip.compress(LINES.replace(b"row", b"new")))
    os.utime(path, ns=(time, time))
    after = opened(path)
    assert parsed(after)[0]["text"] == "new 0"
    assert before.digest != after.digest


@pytest.mark.parametrize(
    ("text", "values"),
    [
        (b"[]", []),
        (b" [ ] ", []),
        (b'[{"a": "]}, \\" \\\\"}, {"b": [1, {}]}]', [b'{"a": "]}, \\" \\\\"}', b'{"b": [1, {}]}']),
        (b"\xef\xbb\xbf[1,\n 2 ,]\n", [b"1", b"2"]),
        (b'{"a": 1}{"b": {"c": "}"}}\n\n{"d": 2}', [b'{"a": 1}', b'{"b": {"c": "}"}}', b'{"d": 2}']),
        (b"[{1: 2}, nonsense]", [b"{1: 2}", b"nonsense"]),
    ],
)
def test_values_are_cut_out_of_json_unparsed(text: bytes, values: list[bytes]) -> None:
    assert list(json_values(text)) == values


@pytest.mark.parametrize(
    "text",
    [b"", b"5", b'"text"', b"[1, 2", b'[{"a": 1}, {', b'[{"a": "b}]', b"[1] 2", b'{"a": 1} x {"b": 2}', b'{"a": '],
)
def test_json_that_is_cut_off_or_something_else_is_not_read(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"it ends in the middle|neither a JSON list|something"):
        list(json_values(text))


def test_tables_lose_the_nulls_that_arrow_invents_and_no_others(tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": "Yo", "weight": 1}
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}
    other = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "g", "arguments": {"b": "x"}}}]}
    rows = [{"messages": [{"role": "user", "content": "Hi", "name": None}, turn]} for turn in (answer, call, other)]
    tools = json.dumps([{"name": "f", "default": None}])
    table = pa.Table.from_pylist([{**row, "tools": tools} for row in rows])
    pq.write_table(table, tmp_path / "x.parquet")
    datasets.Dataset(table).save_to_disk(tmp_path / "saved")
    for source in (
        opened(tmp_path / "x.parquet"),
        opened(tmp_path / "x.parquet", streaming=True),
        opened(tmp_path / "saved"),
    ):
        form = form_of(source.columns)
        found = [conversation_of(row, form) for row in parsed(source)]
        asked = {"role": "user", "content": "Hi", "name": None}
        assert [c.messages for c in found] == [
            [asked, {"role": "assistant", "content": "Yo", "name": None}],
            [asked, {**call, "name": None}],
            [asked, {**other, "name": None}],
        ]
        assert found[0].tools == [{"name": "f", "default": None}]


def test_a_table_with_an_image_is_opened_without_decoding_it(tmp_path: Path) -> None:
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "image": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
        }
    )
    data = datasets.Dataset.from_list(
        [{"text": "x", "image": {"bytes": b"not an image", "path": None}}], features=features
    )
    kind = json.loads(data.data.table.schema.metadata[b"huggingface"])
    kind["info"]["features"]["image"] = {"_type": "Image"}
    table = data.data.table.replace_schema_metadata({"huggingface": json.dumps(kind)})
    pq.write_table(table, tmp_path / "x.parquet")
    for streaming in (False, True):
        [row] = parsed(opened(tmp_path / "x.parquet", streaming=streaming))
        assert row["image"]["bytes"] == b"not an image"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("x.csv", r"ends in '.csv'.*load_dataset\('csv', data_files='x.csv', split='train'\).to_json\('rows.jsonl'\)"),
        ("x.tsv", r"sep='\\t'"),
        ("x.txt", r"load_dataset\('text'"),
        ("x.arrow", r"from_file\('x.arrow'\)"),
        ("x.jsonl.xz", "Unpack it; of compressed files .gz, .zst, .bz2 are read"),
        ("x.zip", "Unpack it"),
        ("x.gz", "has to be called .jsonl or .json before that"),
        ("x.parquet.gz", "compresses itself"),
        ("x.xlsx", "Convert it to a .jsonl file"),
        ("x.pt", "Rows of ids go into a .parquet file"),
        ("README", "ends in 'nothing'; a dataset file ends in one of .jsonl, .json, .parquet"),
    ],
)
def test_a_file_of_another_kind_is_refused_with_what_to_do(name: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        opened(write(tmp_path / name, b"x"))
    if name != "README":
        with pytest.raises(
            InputError, match=f"holds no .jsonl, .json, .parquet file.*found: {name}.*{words.split('.*')[-1]}"
        ):
            opened(tmp_path)


def test_what_a_folder_holds_and_is_not_read_is_named(tmp_path: Path) -> None:
    write(tmp_path / "data" / "a.JSONL", ROWS[:1])
    write(tmp_path / "data" / "b.jsonl.gz", gzip.compress(LINES))
    write(tmp_path / "elsewhere" / "c.jsonl", ROWS[:2])
    (tmp_path / "data" / "c.jsonl").symlink_to(tmp_path / "elsewhere" / "c.jsonl")
    (tmp_path / "data" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "gone.jsonl").symlink_to(tmp_path / "nothing")
    write(tmp_path / "data" / "empty.jsonl", b"")
    write(tmp_path / "data" / "notes.csv", b"a,b")
    write(tmp_path / "data" / ".hidden" / "x.jsonl", ROWS)
    rows = opened(tmp_path / "data")
    assert [label for _, label in rows.places()] == ["a.JSONL", "b.jsonl.gz", "c.jsonl"]
    assert len(parsed(rows)) == 13
    assert rows.sources[0].note == (
        f"{tmp_path / 'data'}: not read: gone.jsonl (a link to nothing), more (a link to a folder), notes.csv, "
        "empty.jsonl (empty)"
    )


def test_the_same_rows_compressed_and_not_are_not_read_twice(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", LINES)
    write(tmp_path / "a.jsonl.gz", gzip.compress(LINES))
    with pytest.raises(InputError, match=r"holds a.jsonl both compressed and not"):
        opened(tmp_path)


# -- several sources --------------------------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """A file of 10 rows, and a folder with files of 10 and 1,000."""
    write(tmp_path / "more" / "1.jsonl", LINES)
    write(tmp_path / "more" / "2.jsonl", [{"prompt": f"p {i}", "response": "r"} for i in range(1000)])
    return write(tmp_path / "one.jsonl", LINES), tmp_path / "more"


@pytest.mark.parametrize("streaming", [False, True])
def test_sources_follow_each_other_with_their_own_columns_and_names(two: tuple[Path, Path], streaming: bool) -> None:
    one, more = two
    rows = opened(one, more, one, streaming=streaming)
    read = rows.read(0, 2000)
    assert len(read) == 1030
    assert [read.where(n) for n in (0, 9, 10, 20, 1019, 1020)] == [
        f"{one} row 1", f"{one} row 10", f"{more}/1.jsonl row 1", f"{more}/2.jsonl row 1", f"{more}/2.jsonl row 1000",
        f"{one} row 1",
    ]  # fmt: skip
    assert {read.columns_of(n) for n in (0, 9, 1020)} == {("text", "when", "more")}
    assert read.columns_of(10) == read.columns_of(1019) == ("text", "when", "more", "prompt", "response")
    assert rows.source_starts() == [0, 10, 1020]
    again = rows.read(15, 25)
    assert [parse_row(raw or b"") for raw in again.raw] == [parse_row(raw or b"") for raw in read.raw[15:25]]
    assert len(opened(one, more, limit=15, streaming=streaming).read(0, 100)) == 15


def test_order_weight_and_number_of_sources_are_part_of_the_digest(two: tuple[Path, Path]) -> None:
    one, more = two
    digests = [opened(*names).digest for names in ((one,), (more,), (one, more), (more, one), (one, one))]
    digests += [opened(one, weight=0.5).digest, opened(one, more, weight=0.5).digest]
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_weight_draws_the_same_rows_every_time(two: tuple[Path, Path], streaming: bool) -> None:
    _, more = two

    def drawn(weight: float, *names: Path) -> list[bool]:
        return [raw is not None for raw in opened(*names, weight=weight, streaming=streaming).read(0, 5000).raw]

    half = drawn(0.5, more)
    assert 430 < sum(half) < 580
    assert drawn(0.5, more) == half
    assert drawn(0.5, more, more) == half + half  # whatever stands before it
    tenth = drawn(0.1, more)
    assert 60 < sum(tenth) < 145
    assert all(in_half for in_tenth, in_half in zip(tenth, half, strict=True) if in_tenth)
    source = opened(more, weight=0.5).sources[0]
    assert source.drawn(3, 20).tolist() == half[3:20]
    assert source.drawn(0, 100_000).mean() == pytest.approx(0.5, abs=0.01)


def test_the_rows_that_a_weight_draws_never_change(two: tuple[Path, Path]) -> None:
    """Caches that were begun have to go on with the same rows in every version."""
    source = opened(two[0], weight=0.5).sources[0]
    fixed = dataset_module.Source(name="x", digest="abc", parts=source.parts, weight=0.5)
    assert np.flatnonzero(fixed.drawn(0, 16)).tolist() == [0, 5, 7, 10, 11, 12, 13, 14, 15]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.jsonl", ("a.jsonl", None, 1.0)),
        ("a.jsonl:0.5", ("a.jsonl", None, 0.5)),
        ("a.jsonl:.5", ("a.jsonl", None, 0.5)),
        ("owner/name:train_sft", ("owner/name", "train_sft", 1.0)),
        ("owner/name:train_sft:0.25", ("owner/name", "train_sft", 0.25)),
        ("s3://bucket/x", ("s3://bucket/x", None, 1.0)),
    ],
)
def test_a_source_may_end_in_a_split_and_a_weight(text: str, expected: tuple[Any, ...]) -> None:
    assert parse_data(text) == expected


def test_a_path_that_exists_is_all_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl:0.5", LINES)
    assert parse_data(str(path)) == (str(path), None, 1.0)


@pytest.mark.parametrize("weight", ["0", "1.5", "2"])
def test_a_weight_is_a_share(weight: str) -> None:
    name, _, number = parse_data(f"a.jsonl:{weight}")
    with pytest.raises(InputError, match=r"more than 0 and at most 1; to take all rows twice, give the source twice"):
        DataOptions(name=name, weight=number)


def options(*data: str, **more: Any) -> tuple[DataOptions, ...]:
    arguments = {"target": "t", "out": "o", "target_layers": None, "shard_size": "1GiB", "batch_tokens": "1"}
    found = extract_options({**arguments, "capture": [], "data": list(data), **more}).data
    assert isinstance(found, tuple)
    return found


def test_split_and_configuration_count_for_the_sources_that_have_them(two: tuple[Path, Path], tmp_path: Path) -> None:
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "saved")
    one, saved = str(two[0]), str(tmp_path / "saved")
    found = options(one, saved, "a/b", "c/d:test:0.5", split="train", data_config="main", data_revision="v1")
    assert [(o.split, o.data_config, o.data_revision, o.weight) for o in found] == [
        (None, None, None, 1.0), ("train", None, None, 1.0), ("train", "main", "v1", 1.0), ("test", "main", "v1", 0.5),
    ]  # fmt: skip
    assert options(one, split="train")[0].split == "train"  # refused by name when it is opened
    for more in ({"split": "train"}, {"data_config": "main"}):
        with pytest.raises(InputError, match="no source given with --data has any"):
            options(one, one, **more)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub of one dataset, with two configurations."""
    rows = datasets.Dataset.from_list(ROWS)
    api = SimpleNamespace(dataset_info=lambda name, revision: SimpleNamespace(sha="c" * 40))
    monkeypatch.setattr(dataset_module, "HfApi", lambda: api)
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name, revision: ["main", "socratic"])
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config, revision: ["train", "test"])
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, **options: rows)


@pytest.mark.usefixtures("hub")
def test_a_hub_dataset_has_a_configuration_and_a_split() -> None:
    rows = opened("a/b", split="train", data_config="main")
    assert parsed(rows) == [{"text": row["text"], "when": row["when"], "more": None} for row in ROWS]
    assert rows.read(0, 1).where(0) == "a/b (train) row 1"
    assert rows.digest != opened("a/b", split="train", data_config="socratic").digest
    with pytest.raises(InputError, match="has the configs main, socratic; choose one with --data-config"):
        opened("a/b", split="train")
    with pytest.raises(InputError, match="--data-config x: a/b has no such config, only main, socratic"):
        opened("a/b", split="train", data_config="x")
    with pytest.raises(InputError, match="has the splits train, test; choose one with --split"):
        opened("a/b", data_config="main")


def test_a_configuration_of_a_local_file_is_refused(two: tuple[Path, Path]) -> None:
    with pytest.raises(InputError, match=r"--data-config main: .* is local; only hub datasets have configs"):
        opened(two[0], data_config="main")


# -- in a cache -------------------------------------------------------------------------------------------------------


def test_a_cache_says_what_each_source_gave(tiny_target: Path, tmp_path: Path, cli: Any) -> None:
    def pair(number: int) -> dict[str, str]:
        return {"question": f"{number}?", "answer": "one two three"}

    first = write(tmp_path / "first.jsonl", [pair(n) for n in range(20)])
    write(tmp_path / "more" / "a.jsonl", [{"prompt": "Hi", "chosen": "Yo", "rejected": "No", "id": 1}] * 3)
    write(tmp_path / "more" / "b.jsonl.gz", gzip.compress(b'{"prompt": "Hi", "chosen": "Yes", "rejected": null}\n'))
    write(tmp_path / "more" / "c.csv", b"a,b")
    kto = write(tmp_path / "kto.jsonl", [{"ask": "Hi", "say": "Yo", "label": good} for good in (True, False)])
    job = ["--target", tiny_target, "--device", "cpu", "--target-layers", "0,2", "--columns", "prompt=ask,response=say"]
    job += [argument for name in (f"{first}:0.5", tmp_path / "more", kto) for argument in ("--data", name)]
    code, _, err = cli("extract", *job, "--out", tmp_path / "c")
    assert code == 0, err
    assert "more: not read: c.csv" in err
    assert "3 rejected sides of preference rows are left out" in err
    data = json.loads((tmp_path / "c" / "manifest.json").read_bytes())["data"]
    drawn = int(opened(first, weight=0.5).sources[0].drawn(0, 20).sum())
    assert data["dropped"] == {"by_weight": 20 - drawn, "rejected": 1}
    assert data["noted"] == {"rejected_side": 3}
    one, two, three = data["sources"]
    assert [s["samples"] for s in data["sources"]] == [drawn, 4, 1]
    assert [s["weight"] for s in data["sources"]] == [0.5, 1.0, 1.0]
    assert one["columns"] == {"prompt": "question", "response": "answer"}
    assert (two["row_format"], two["unused_columns"]) == ("preference", ["id"])
    assert two["files"] == {f"{tmp_path}/more/a.jsonl": 20, f"{tmp_path}/more/b.jsonl.gz": 23}
    assert three["columns"] == {"prompt": "ask", "response": "say"}
    assert (
        sum(s["tokens"] for s in data["sources"])
        == json.loads(cli("inspect", tmp_path / "c", "--json")[1])["totals"]["tokens"]
    )
    told = cli("inspect", tmp_path / "c")[1]
    assert f"{first}:0.5: {drawn} samples, " in told
    assert "preference (prompt from prompt, chosen from chosen); columns not used: id" in told
    again = cli("extract", *job, "--streaming", "--out", tmp_path / "streamed")
    assert again[0] == 0, again[2]
    assert json.loads((tmp_path / "streamed" / "manifest.json").read_bytes())["data"] == data
    code, _, err = cli("extract", *(str(a).replace(":0.5", ":0.6") for a in job), "--out", tmp_path / "c")
    assert (code, "data.digest: cache has" in err) == (2, True)


def test_columns_that_no_source_has_are_refused_before_anything_is_written(
    tiny_target: Path, tmp_path: Path, cli: Any
) -> None:
    data = write(tmp_path / "x.jsonl", [{"question": "Hi", "answer": "Yo"}])
    job = [
        "--target",
        tiny_target,
        "--device",
        "cpu",
        "--target-layers",
        "0,2",
        "--data",
        data,
        "--out",
        tmp_path / "c",
    ]
    code, _, err = cli("extract", *job, "--columns", "prompt=ask,response=say")
    assert (code, "--columns names ask and say, which the data does not have; found: question, answer" in err) == (
        2,
        True,
    )
    code, _, err = cli("extract", *job, "--columns", "promt=ask")
    assert (code, "no such field" in err) == (2, True)
