"""Rows that cannot be used: what is wrong with one costs that row alone, is counted by kind, and says where it is."""

from __future__ import annotations

import json
import multiprocessing
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from chat import chat_tokenizer
from transformers import AutoTokenizer

from cache_format.layout.manifest import Manifest
from cache_format.layout.samples import BadRows, Dropped, PreparedSamples
from extractor.config import DataOptions, PrepareOptions
from extractor.data import bad_row as bad_row_module
from extractor.data import prepare as prepare_module
from extractor.data import process_pool
from extractor.data.bad_row import BadRow, guarded
from extractor.data.dataset import open_source
from extractor.data.prepare import prepare, prepare_rows


def chat(question: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "yes"}]}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


BAD = [
    "{oops",
    {"messages": [{"role": "robot", "content": "x"}]},
    {"messages": []},
    '{"messages": [',
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "secret.png"}]}]},
    {"messages": [{"role": "user", "content": [{"type": "audio", "audio": "hidden"}]}]},
]


@pytest.fixture(scope="module")
def tokenizer(tiny_target: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_target)


def test_bad_rows_are_counted_by_kind_with_the_first_of_each(tmp_path: Path, tokenizer: Any) -> None:
    rows = write(tmp_path / "x.jsonl", [chat("a"), *BAD, chat("b"), *BAD])
    source = open_source(DataOptions(name=str(rows)))
    samples, dropped = prepare_rows(source.read(0, 100), tokenizer, PrepareOptions(on_bad_row="skip"))
    assert [sample.source_row for sample in samples] == [0, 7]
    assert dropped == {"bad_row": 12}
    assert sum(found.rows for found in dropped.bad_rows.values()) == 12
    firsts = {found.first: found.rows for found in dropped.bad_rows.values()}
    assert firsts == {"x.jsonl row 2": 4, "x.jsonl row 3": 2, "x.jsonl row 4": 2, "x.jsonl row 6": 4}
    assert not [reason for reason in dropped.bad_rows for word in ("image", "audio", "robot") if word in reason]


def test_the_kinds_are_kept_from_part_to_manifest_and_shown(
    job: list[str], cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "ROWS_PER_PART", 5)
    data = write(tmp_path / "x.jsonl", [chat("a"), *BAD, chat("b"), *BAD])
    arguments = [str(data) if text.endswith("train.jsonl") else text for text in job]
    code, _, err = cli("extract", *arguments, "--out", tmp_path / "c", "--on-bad-row", "skip")
    assert code == 0, err
    assert PreparedSamples(tmp_path / "c" / "samples", 3).dropped.bad_rows["is not JSON"] == BadRows(4, "x.jsonl row 2")
    manifest = Manifest.read(tmp_path / "c")
    assert manifest.data is not None
    assert manifest.data.bad_rows["is not JSON"] == BadRows(4, "x.jsonl row 2")
    shown = "4 x is not JSON (first: x.jsonl row 2)"
    assert f"bad rows: {shown}" in err
    code, out, _ = cli("inspect", tmp_path / "c")
    assert shown in out
    code, out, _ = cli("inspect", tmp_path / "c", "--json")
    assert json.loads(out)["data"]["bad_rows"]["is not JSON"] == {"rows": 4, "first": "x.jsonl row 2"}
    code, out, _ = cli("estimate", *arguments, "--on-bad-row", "skip")
    assert shown in out


def test_a_manifest_without_bad_rows_is_what_earlier_versions_wrote(made: Path) -> None:
    assert "bad_rows" not in json.loads((made / "manifest.json").read_bytes())["data"]
    data = Manifest.read(made).data
    assert data is not None
    assert data.bad_rows == {}


def test_later_parts_add_to_earlier_ones() -> None:
    total = Dropped({"bad_row": 2}, {"a": BadRows(2, "x row 1")})
    total.add(Dropped({"bad_row": 4, "empty": 1}, {"a": BadRows(3, "x row 9"), "b": BadRows(1, "x row 8")}))
    assert total == {"bad_row": 6, "empty": 1}
    assert total.bad_rows == {"a": BadRows(5, "x row 1"), "b": BadRows(1, "x row 8")}


RAISING = {
    "ZeroDivisionError": "{{ 1 // 0 }}",
    "OverflowError": "{{ 2.0 ** 100000 }}",
    "RecursionError": "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    "MemoryError": "{{ 'x' * 10 ** 16 }}",
}


@pytest.mark.parametrize("error", RAISING)
def test_whatever_a_template_raises_is_a_bad_row(error: str, tmp_path: Path) -> None:
    tokenizer = chat_tokenizer("tagged")
    tokenizer.chat_template = f"{{% if messages[0].content == 'bad' %}}{RAISING[error]}{{% endif %}}" + str(
        tokenizer.chat_template
    )
    source = open_source(DataOptions(name=str(write(tmp_path / "x.jsonl", [chat("a"), chat("bad"), chat("b")]))))
    samples, dropped = prepare_rows(source.read(0, 9), tokenizer, PrepareOptions(on_bad_row="skip"))
    assert [sample.source_row for sample in samples] == [0, 2]
    [(reason, found)] = dropped.bad_rows.items()
    assert found == BadRows(1, "x.jsonl row 2")
    assert error in reason


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}" + "{% endfor %}" * 3


@pytest.mark.parametrize("processes", [1, 2])
def test_a_template_that_does_not_end_is_a_bad_row(
    processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forked = SimpleNamespace(
        get_context=lambda _method: multiprocessing.get_context("fork"), parent_process=multiprocessing.parent_process
    )
    monkeypatch.setattr(process_pool, "multiprocessing", forked)
    monkeypatch.setattr(prepare_module, "ROWS_PER_PART", 2)
    tokenizer = chat_tokenizer("tagged")
    tokenizer.chat_template = f"{{% if messages[0].content == 'bad' %}}{ENDLESS}{{% endif %}}{tokenizer.chat_template}"
    monkeypatch.setattr(bad_row_module, "SECONDS_A_ROW", 0.3)
    source = open_source(DataOptions(name=str(write(tmp_path / "x.jsonl", [chat("a"), chat("bad"), chat("b")]))))
    began = time.monotonic()
    prepare(source, tokenizer, PrepareOptions(on_bad_row="skip"), tmp_path / "p", num_workers=processes)
    assert time.monotonic() - began < 60
    samples = PreparedSamples(tmp_path / "p", 2)
    assert samples.source_rows.tolist() == [0, 2]
    assert samples.dropped.bad_rows == {"is not done in time": BadRows(1, "x.jsonl row 2")}


def test_a_swallowed_end_rings_again_and_nothing_rings_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bad_row_module, "SECONDS_A_ROW", 0.1)
    swallowed = 0
    with pytest.raises(BadRow, match="processor time"), guarded():
        while True:
            try:
                while True:
                    pass
            except BaseException:
                swallowed += 1
                if swallowed > 1:
                    raise
    with guarded():
        pass
    ends = time.process_time() + 0.3
    while time.process_time() < ends:
        pass


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        ("turn 12: content part of type 'image_url'; only text parts", "content part of type ...; only text parts"),
        ("turn 2 has no content", "a turn has no content"),
        ("'messages' is a str, not a list of turns", "'messages' is a str, not a list of turns"),
        ("token id -7 in 'input_ids' is outside 0..2,047", "token id N in 'input_ids' is outside N"),
        ("is not JSON: Expecting value: line 1", "is not JSON"),
        ("the row's text ends in \"it's\" here", "the row's text ends in ... here"),
    ],
)
def test_a_reason_holds_nothing_of_the_row(problem: str, reason: str) -> None:
    assert BadRow(problem).reason == reason
    assert BadRow(f"{problem} {'x' * 10_000}").args[0].endswith("...")
