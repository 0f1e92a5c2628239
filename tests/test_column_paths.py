"""--columns goes into lists and objects: answers that a set keeps beside others are taken, or the row is bad."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat import chat_tokenizer

from cache_format.errors import InputError
from extractor.config import DataOptions, PrepareOptions, parse_columns
from extractor.data.column_paths import with_paths
from extractor.data.dataset import RowSource, open_source
from extractor.data.prepare import form_of_source, prepare_rows, require_forms

SQUAD = {"id": "1", "title": "t", "context": "c", "question": "Hi", "answers": {"text": ["Yo"], "answer_start": [3]}}
ULTRAFEEDBACK = {
    "source": "x",
    "instruction": "Hi",
    "models": ["a", "b"],
    "completions": [{"response": "Yo", "annotations": {"helpfulness": {"Rating": "5"}}}, {"response": "No"}],
}
NECTAR = {
    "prompt": "\n\nHuman: Hi\n\nAssistant: ",
    "answers": [{"answer": "Yo", "model": "a", "rank": 1.0}, {"answer": "No", "model": "b", "rank": 7.0}],
    "turns": 1,
}
KINDS = {
    "SQuAD": (SQUAD, "prompt=question,response=answers.text.0"),
    "UltraFeedback": (ULTRAFEEDBACK, "prompt=instruction,response=completions.0.response"),
    "Nectar": (NECTAR, "response=answers.0.answer"),
    "a conversation in an object": ({"data": {"a": {"chat": [{"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yo"}]}}}, "messages=data.a.chat"),
    "dots in a name": ({"question": "Hi", "a.b": "Yo", "a": {"b": "No"}}, "prompt=question,response=a.b"),
}  # fmt: skip


def source(folder: Path, rows: list[dict[str, Any]], ending: str) -> RowSource:
    path = folder / f"rows{ending}"
    if ending == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_source(DataOptions(name=str(path)))


def learned(rows: RowSource, columns: str) -> list[str]:
    tokenizer, options = chat_tokenizer("llama3"), PrepareOptions(columns=parse_columns(columns), min_loss_tokens=0)
    require_forms(rows, tokenizer, options)
    samples, _ = prepare_rows(rows.read(0, 10), tokenizer, options)
    return [tokenizer.decode(s.input_ids[s.loss_mask != 0]) for s in samples]


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_among_others_is_learned(kind: str, ending: str, tmp_path: Path) -> None:
    row, columns = KINDS[kind]
    assert learned(source(tmp_path, [row], ending), columns) == ["Yo<|eot_id|>"]


@pytest.mark.parametrize("kind", ["SQuAD", "UltraFeedback", "Nectar"])
def test_without_the_option_the_way_out_is_named(kind: str, tmp_path: Path) -> None:
    rows = source(tmp_path, [KINDS[kind][0]], ".jsonl")
    with pytest.raises(InputError, match=r"--columns prompt=\w+,response=COLUMN; .* such as answers\.0\.text"):
        require_forms(rows, chat_tokenizer("llama3"), PrepareOptions())


def test_where_a_path_leads_nowhere_the_row_is_bad(tmp_path: Path) -> None:
    unanswerable = {**SQUAD, "answers": {"text": [], "answer_start": []}}
    rows = source(tmp_path, [SQUAD, unanswerable], ".jsonl")
    with pytest.raises(InputError, match=r"rows.jsonl row 2: 'answers.text.0' is .*--on-bad-row skip"):
        learned(rows, "prompt=question,response=answers.text.0")
    with pytest.raises(InputError, match=r"row 1: .* to learn the first one: --columns response=answers.text.0\."):
        learned(rows, "prompt=question,response=answers.text")
    with pytest.raises(InputError, match=r"--columns names replies\.0\.text, which the data does not have"):
        learned(rows, "prompt=question,response=replies.0.text")


def test_a_column_that_a_path_goes_into_is_used(tmp_path: Path) -> None:
    rows = source(tmp_path, [SQUAD], ".jsonl")
    options = PrepareOptions(columns=parse_columns("prompt=question,response=answers.text.0"))
    form = form_of_source(rows.column_sets[0], options)
    assert form.unused(rows.column_sets[0]) == ["id", "title"]


@pytest.mark.parametrize("path", ["a..b", "a.", "a.-1", "a.99999999999999999999", "a.0.0.0", "a.x", "a.٣"])
def test_no_path_raises(path: str) -> None:
    for value in ([1, [2]], {"x": None}, "text", None, 5):
        assert with_paths({"a": value}, [path])[path] is None
