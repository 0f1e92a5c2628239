"""Preparation: what is kept and dropped, one process or several, restarts, and errors that name the row."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import commands
import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat import chat_tokenizer
from jobs import contents
from transformers import AutoTokenizer

from cache_format.errors import InputError, StorageError
from cache_format.layout.samples import PreparedSamples, part_path, read_part
from extractor.config import DataOptions, PrepareOptions
from extractor.data import prepare as prepare_module
from extractor.data import process_pool
from extractor.data.dataset import RowSource, open_source
from extractor.data.prepare import prepare, prepare_rows


@pytest.fixture(scope="module")
def tokenizer(tiny_target: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_target)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "ROWS_PER_PART", 64)


def source(path: Path, limit: int | None = None, **kwargs: Any) -> RowSource:
    return open_source(DataOptions(name=str(path), **kwargs), limit)


def write(path: Path, rows: list[Any]) -> RowSource:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return source(path)


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def run(rows: RowSource, tokenizer: Any, **options: Any) -> tuple[list[tuple[list[int], list[int], int]], Counter[str]]:
    samples, dropped = prepare_rows(rows.read(0, 10_000), tokenizer, PrepareOptions(**options))
    return [(s.input_ids.tolist(), s.loss_mask.tolist(), s.source_row) for s in samples], dropped


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# -- rows -> samples --------------------------------------------------------------------------------------------------


def test_every_row_is_kept_or_counted_once(demo_jsonl: Path, tokenizer: Any) -> None:
    samples, dropped = run(source(demo_jsonl), tokenizer, max_length=200, too_long="drop", min_loss_tokens=20)
    assert dropped["too_long"]
    assert dropped["too_few_loss_tokens"]
    assert len(samples) + sum(dropped.values()) == 300
    assert all(len(ids) <= 200 and sum(mask) >= 20 for ids, mask, _ in samples)
    rows = [row for _, _, row in samples]
    assert rows == sorted(set(rows))


def test_truncation_keeps_the_beginning_and_then_counts_the_learned_tokens(tmp_path: Path, tokenizer: Any) -> None:
    rows = write(tmp_path / "x.jsonl", [chat("Hi", "one two three four five six"), chat("long " * 40, "short")])
    whole, _ = run(rows, tokenizer)
    assert whole[0][1][-2:] == [1, 0]  # the end token is learned, the newline behind it is not
    cut, dropped = run(rows, tokenizer, max_length=12)
    assert cut == [(whole[0][0][:12], whole[0][1][:12], 0)]
    assert dropped == {"too_few_loss_tokens": 1}
    assert len(run(rows, tokenizer, max_length=12, min_loss_tokens=0)[0]) == 2


def test_blank_lines_and_empty_rows_count_as_empty(tmp_path: Path, tokenizer: Any) -> None:
    rows = write(tmp_path / "x.jsonl", [{"input_ids": [], "loss_mask": []}, "", {"input_ids": [3], "loss_mask": [1]}])
    assert run(rows, tokenizer) == ([([3], [1], 2)], {"empty": 2})


def test_text_needs_loss_on_all(tmp_path: Path, tokenizer: Any) -> None:
    rows = write(tmp_path / "x.jsonl", [{"text": "Hello world"}])
    ids = tokenizer("Hello world")["input_ids"]
    assert run(rows, tokenizer, loss_on="all")[0] == [(ids, [1] * len(ids), 0)]
    for loss_on in (None, "assistant"):
        with pytest.raises(InputError, match="--loss-on all"):
            run(rows, tokenizer, loss_on=loss_on)


def test_input_ids_take_the_mask_from_a_column_or_learn_all(tmp_path: Path, tokenizer: Any) -> None:
    rows = write(tmp_path / "x.jsonl", [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}])
    assert run(rows, tokenizer)[0] == [([5, 6, 7], [0, 1, 1], 0)]
    assert run(rows, tokenizer, loss_on="all")[0] == [([5, 6, 7], [1, 1, 1], 0)]
    bare = write(tmp_path / "y.jsonl", [{"input_ids": [5, 6, 7]}])
    assert run(bare, tokenizer, loss_on="all")[0] == [([5, 6, 7], [1, 1, 1], 0)]
    with pytest.raises(InputError, match="need a column loss_mask or labels, or --loss-on all; found: input_ids"):
        run(bare, tokenizer)
    with pytest.raises(InputError, match="--loss-on assistant"):
        run(rows, tokenizer, loss_on="assistant")


def test_prompt_and_response_go_through_the_chat_template(tmp_path: Path, tokenizer: Any) -> None:
    pair = write(tmp_path / "x.jsonl", [{"prompt": "Hi", "response": "Yo"}])
    same = write(tmp_path / "y.jsonl", [chat("Hi", "Yo")])
    assert run(pair, tokenizer) == run(same, tokenizer)


def test_prompt_and_response_without_chat_template_learn_response_and_eos(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer("llama3")
    tokenizer.chat_template = None
    rows = write(tmp_path / "x.jsonl", [{"prompt": "Hi", "response": " there\n"}])
    [(ids, mask, _)], _ = run(rows, tokenizer)
    prompt = len(tokenizer("Hi")["input_ids"])
    assert mask == [0] * prompt + [1] * (len(ids) - prompt)
    assert tokenizer.decode(ids[prompt:]) == " there\n<|eot_id|>"
    assert all(run(rows, tokenizer, loss_on="all")[0][0][1])
    with pytest.raises(InputError, match="no chat template"):
        run(write(tmp_path / "y.jsonl", [chat("Hi", "Yo")]), tokenizer)


def test_loss_on_column_is_for_input_ids(demo_jsonl: Path, tokenizer: Any) -> None:
    with pytest.raises(InputError, match="--loss-on column is for rows of input_ids"):
        run(source(demo_jsonl), tokenizer, loss_on="column")


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        ('{"messages": [', "is not JSON"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "'role' is missing or not one of"),
        ({"other": 1}, "'messages' is missing"),
        (chat("half a pair: \ud800", "x"), "surrogate"),
        ({"messages": [{"role": "assistant", "content": "I first"}]}, "begins with the assistant"),
    ],
)
def test_a_bad_row_fails_by_file_and_row_or_is_skipped(bad: Any, problem: str, tmp_path: Path, tokenizer: Any) -> None:
    rows = write(tmp_path / "x.jsonl", [chat("a", "b"), chat("c", "d"), bad, chat("e", "f")])
    with pytest.raises(InputError, match=rf"^x.jsonl row 3: .*{problem}.*--on-bad-row skip$"):
        run(rows, tokenizer)
    samples, dropped = run(rows, tokenizer, on_bad_row="skip")
    assert [row for _, _, row in samples] == [0, 1, 3]
    assert dropped == {"bad_row": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 0}, "--max-length 0: must be at least 1"),
        ({"min_loss_tokens": -1}, "--min-loss-tokens -1"),
        ({"limit": 0}, "--limit 0"),
        ({"too_long": "cut"}, "--too-long 'cut': choose one of truncate, drop"),
        ({"loss_on": "user"}, "--loss-on 'user': choose one of assistant, all, column"),
        ({"row_format": "csv"}, "--row-format 'csv': choose one of messages"),
        ({"on_bad_row": "ignore"}, "--on-bad-row 'ignore'"),
    ],
)
def test_options_check_themselves(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PrepareOptions(**options)


# -- parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_several_processes_write_the_same_bytes(
    kind: str, demo_jsonl: Path, tiny_target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind != "jsonl":
        monkeypatch.setattr(process_pool, "multiprocessing", commands.ready_processes())
    path = demo_jsonl
    if kind == "parquet":
        path = tmp_path / "demo.parquet"
        lines = demo_jsonl.read_text().splitlines()
        pq.write_table(pa.Table.from_pylist([json.loads(line) for line in lines]), path)
    rows, options = source(path, 290), PrepareOptions(max_length=64)
    told: list[tuple[int, int | None, int]] = []
    alone = prepare(rows, tiny_target, options, tmp_path / "one", num_workers=1)
    both = prepare(rows, tiny_target, options, tmp_path / "two", num_workers=2, progress=lambda *now: told.append(now))
    assert alone == both == 5
    assert files(tmp_path / "one") == files(tmp_path / "two")
    samples = PreparedSamples(tmp_path / "two", both)
    assert samples.num_rows == 290
    assert [done for done, _, _ in told] == [0, 64, 128, 192, 256, 290]
    assert told[-1] == (290, 290, len(samples))


@pytest.mark.usefixtures("small_parts")
def test_a_bad_row_fails_by_file_and_row_in_another_process(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_pool, "multiprocessing", commands.ready_processes())
    lines: list[Any] = [chat("a", "b")] * 200
    lines[150] = "{oops"
    rows = write(tmp_path / "x.jsonl", lines)
    with pytest.raises(InputError, match=r"^x.jsonl row 151: is not JSON"):
        prepare(rows, tokenizer, PrepareOptions(), tmp_path / "parts", num_workers=2)
    written = [path.name for path in (tmp_path / "parts").iterdir()]
    assert "samples-00002.arrow" not in written
    assert "samples-00000.arrow" in written


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("streaming", [False, True])
def test_a_restart_keeps_whole_parts_and_mends_the_rest(
    streaming: bool, demo_jsonl: Path, tokenizer: Any, tmp_path: Path
) -> None:
    rows = source(demo_jsonl, streaming=streaming)
    assert prepare(rows, tokenizer, PrepareOptions(), tmp_path, num_workers=1) == 5
    whole = files(tmp_path)
    kept = part_path(tmp_path, 0).stat().st_ino
    part_path(tmp_path, 1).unlink()
    data = bytearray(part_path(tmp_path, 2).read_bytes())
    part_path(tmp_path, 2).write_bytes(data[: len(data) // 2])
    flipped = bytearray(part_path(tmp_path, 3).read_bytes())
    ids = read_part(part_path(tmp_path, 3))[0].column("input_ids")[0].values.to_numpy().astype("<i4").tobytes()
    flipped[flipped.index(ids)] ^= 1
    part_path(tmp_path, 3).write_bytes(flipped)
    (tmp_path / "samples-00007.arrow").write_bytes(whole["samples-00000.arrow"])
    told: list[int] = []
    again = prepare(
        source(demo_jsonl, streaming=streaming),
        tokenizer,
        PrepareOptions(),
        tmp_path,
        progress=lambda done, total, kept: told.append(done),
        num_workers=1,
    )
    assert again == 5
    assert files(tmp_path) == whole
    assert part_path(tmp_path, 0).stat().st_ino == kept
    assert told[0] == (64 if streaming else 64 + 44)  # where the end is unknown, a short last part may not be the last


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("of", ["other data", "nobody"])
def test_parts_that_were_made_for_something_else_are_made_anew(
    of: str, demo_jsonl: Path, tokenizer: Any, tmp_path: Path
) -> None:
    def parts(folder: str, made_for: str, **options: Any) -> dict[str, bytes]:
        prepare(source(demo_jsonl), tokenizer, PrepareOptions(**options), tmp_path / folder, made_for=made_for)
        return files(tmp_path / folder)

    wanted = parts("alone", "this", max_length=100)
    other = parts("taken", "" if of == "nobody" else of, max_length=50)
    assert other.keys() == wanted.keys()
    assert parts("taken", "this", max_length=100) == wanted


@pytest.mark.usefixtures("small_parts")
def test_streamed_rows_give_the_same_parts(demo_jsonl: Path, tokenizer: Any, tmp_path: Path) -> None:
    prepare(source(demo_jsonl), tokenizer, PrepareOptions(), tmp_path / "mapped")
    prepare(source(demo_jsonl, streaming=True), tokenizer, PrepareOptions(), tmp_path / "streamed", num_workers=1)
    assert files(tmp_path / "mapped") == files(tmp_path / "streamed")


@pytest.mark.usefixtures("small_parts")
def test_a_full_part_of_bad_rows_is_a_part(tmp_path: Path, tokenizer: Any) -> None:
    rows = write(tmp_path / "x.jsonl", [chat("a", "b")] * 64 + ["{"] * 64 + [chat("a", "b")])
    assert prepare(rows, tokenizer, PrepareOptions(on_bad_row="skip"), tmp_path / "p") == 3
    samples = PreparedSamples(tmp_path / "p", 3)
    assert len(samples) == 65
    assert samples.dropped == {"bad_row": 64}
    assert samples.source_rows.tolist() == [*range(64), 128]


def test_options_that_do_not_fit_are_refused_before_anything_is_written(
    demo_jsonl: Path, tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="--row-format text needs the column text; found: messages"):
        prepare(source(demo_jsonl), tokenizer, PrepareOptions(row_format="text"), tmp_path / "parts")
    assert not (tmp_path / "parts").exists()


def test_a_folder_that_cannot_be_made_is_a_storage_error(demo_jsonl: Path, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError):
        prepare(source(demo_jsonl), tokenizer, PrepareOptions(), tmp_path / "file" / "parts")


LONG_RUN = """
import sys
from pathlib import Path
from extractor.config import DataOptions
from extractor.data.dataset import open_source
from extractor.data import prepare as module
from extractor.config import PrepareOptions
from extractor.data.prepare import prepare

if __name__ == "__main__":
    data, target, out = sys.argv[1:]
    module.ROWS_PER_PART = 64
    try:
        prepare(open_source(DataOptions(name=data)), target, PrepareOptions(), Path(out), num_workers=2,
                progress=lambda done, total, kept: print(done, flush=True))
    except KeyboardInterrupt:
        sys.exit(130)
"""


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_stopped_by_a_signal_no_process_stays_and_finished_parts_do(
    stop: signal.Signals, demo_jsonl: Path, tiny_target: Path, tmp_path: Path
) -> None:
    data, script, out = tmp_path / "many.jsonl", tmp_path / "run.py", tmp_path / "parts"
    data.write_text(demo_jsonl.read_text() * 15)
    script.write_text(LONG_RUN)
    process = subprocess.Popen(
        [sys.executable, str(script), str(data), str(tiny_target), str(out)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    while int(process.stdout.readline()) == 0:
        pass
    if stop == signal.SIGINT:
        os.killpg(process.pid, stop)  # as a terminal does: every process of the group is told
    else:
        process.kill()
    _, errors = process.communicate(timeout=180)
    assert process.returncode == (130 if stop == signal.SIGINT else -signal.SIGKILL)
    assert "Traceback" not in errors
    deadline = time.monotonic() + 20
    while _group_is_alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _group_is_alive(process.pid)
    whole = sorted(out.glob("samples-*.arrow"))
    assert whole
    for path in whole:
        read_part(path)
    if stop == signal.SIGINT:
        assert not list(out.glob(".*"))


def _group_is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.usefixtures("small_parts")
def test_a_stream_that_breaks_off_costs_no_finished_part(
    job: list[str], cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that is gone after hours is not bad input: exit code 1, and the next run goes on."""
    job = [*job, "--streaming"]
    monkeypatch.setattr("extractor.data.division.Division.processes", lambda *_: 1)
    assert cli("extract", *job, "--out", tmp_path / "whole")[0] == 0

    class BreaksOff:
        def __init__(self, rows: Any, after: int):
            self.rows, self.after = rows, after

        def __iter__(self) -> Any:
            yield from islice(self.rows, self.after)
            raise ConnectionError("the hub hung up")

    load = datasets.load_dataset
    for after, code in ((110, 1), (50, 2)):
        monkeypatch.setattr(datasets, "load_dataset", lambda *a, n=after, **k: BreaksOff(load(*a, **k), n))
        found, _, err = cli("extract", *job, "--out", tmp_path / "c")
        assert (found, f"after row {after} cannot be read: the hub hung up" in err) == (code, True), err
        assert "Traceback" not in err
        assert (tmp_path / "c" / "samples" / "samples-00000.arrow").exists()
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert cli("extract", *job, "--out", tmp_path / "c")[0] == 0
    assert contents(tmp_path / "c") == contents(tmp_path / "whole")
