"""preview and show: what people look at is what is stored, said for a terminal, a pipe and a program."""

from __future__ import annotations

import inspect
import itertools
import json
import os
import pty
import re
from pathlib import Path
from typing import Any

import commands
import numpy as np
import pytest
from transformers import AutoTokenizer

from cache_format.layout.samples import PreparedSamples
from extractor.cli.extract import extract
from extractor.cli.preview import preview
from extractor.data.stretches import stretches
from extractor.terminal.learned_text import LEARNED_BEGIN, LEARNED_END, Stretch, one_line, painted, printable

GREEN, RESET = "\x1b[32m", "\x1b[0m"


def chat(*texts: str) -> dict[str, Any]:
    roles = ("user", "assistant") * len(texts)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("looking") / "mixed.jsonl"
    rows = [
        json.dumps(chat("Say hi", "Hi there", "more", "and more")),
        '{"messages": [',
        json.dumps(chat("\x1b[31mred\x1b[0m \x07\u202e", "\x1b]0;title\x07 done")),
        "",
        json.dumps(chat("long " * 30, "answer " * 80)),
        '{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}',
    ]
    path.write_text("".join(f"{row}\n" for row in rows))
    return path


@pytest.fixture
def looked(cli: Any, tiny_target: Path, data: Path) -> Any:
    return lambda *arguments: cli("preview", "--target", tiny_target, "--data", data, *arguments)


def sections(out: str) -> dict[str, str]:
    """Headline of each row -> what stands below it."""
    parts = re.split(r"^── (.*?) ─*$", out, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


# -- preview ----------------------------------------------------------------------------------------------------------


def test_learned_tokens_stand_in_brackets_where_there_is_no_colour(looked: Any) -> None:
    code, out, err = looked("-n", "1")
    assert (code, err) == (0, "")
    [(headline, text)] = sections(out).items()
    assert re.fullmatch(r"mixed.jsonl row 1: \d+ tokens, \d+ learned \(\d+ %\)", headline)
    assert "<|im_start|>assistant\n[[Hi there<|im_end|>]]\n" in text
    assert "<|im_start|>assistant\n[[and more<|im_end|>]]\n" in text
    assert text.count("[[") == text.count("]]") == 2


def test_a_bad_row_says_why_and_under_what_it_counts(looked: Any) -> None:
    code, out, _ = looked("--row", "2")
    assert code == 0
    assert "mixed.jsonl row 2: bad row" in out
    assert "is not JSON: Expecting value" in out
    assert "counts as: is not JSON\n" in out
    assert '{"messages": [' in out
    assert "first" not in out


@pytest.mark.parametrize("place", ["3", "mixed.jsonl:3", "mixed.jsonl row 3"])
def test_a_row_is_named_as_messages_name_it(place: str, looked: Any) -> None:
    assert "mixed.jsonl row 3: " in looked("--row", place)[1]


@pytest.mark.parametrize(
    ("place", "problem"),
    [("7", "has 6 rows"), ("0", "from 1"), ("x", "FILE:NUMBER"), ("other.jsonl:1", "it has mixed.jsonl")],
)
def test_a_row_that_is_not_there_is_refused(place: str, problem: str, looked: Any) -> None:
    code, out, err = looked("--row", place)
    assert (code, out) == (2, "")
    assert problem in err


def test_foreign_text_does_nothing_to_a_terminal(looked: Any) -> None:
    for arguments in (["-n", "9"], ["--row", "3"]):
        _, out, _ = looked(*arguments)
        assert not [c for c in out if not c.isprintable() and c != "\n"]
        assert r"\x1b[31mred\x1b[0m \x07\u202e" in out


def test_where_a_row_is_cut_and_what_is_lost(looked: Any, tiny_target: Path) -> None:
    _, out, _ = looked("--row", "5", "--max-length", "80", "--json")
    [sample] = json.loads(out)["rows"][0]["samples"]
    assert len(sample["input_ids"]) == sample["stored"] == 80
    _, out, _ = looked("--row", "5", "--max-length", "80")
    whole, cut = sections(out).items()
    assert f"{sample['tokens']} tokens, cut to 80, {sample['learned']} learned" in whole[0]
    more = f"{sample['tokens'] - 80} more tokens, {sample['cut_off_learned']} of them learned"
    assert cut[0] == f"cut here (--max-length 80): {more}"
    assert AutoTokenizer.from_pretrained(tiny_target).decode(sample["input_ids"]) == plain(whole[1])
    assert "<|im_end|>]]" in cut[1]
    _, out, _ = looked("--row", "5", "--max-length", "80", "--too-long", "drop")
    assert "row 5: dropped: too_long, " in out


def plain(text: str) -> str:
    return text.strip("\n").replace(LEARNED_BEGIN, "").replace(LEARNED_END, "")


def test_the_counts_are_those_of_extract(looked: Any, cli: Any, tiny_target: Path, data: Path, tmp_path: Path) -> None:
    options = ["--max-length", "50", "--min-loss-tokens", "4"]
    job = ["--target", tiny_target, "--data", data, *options, "--on-bad-row", "skip", "--target-layers", "0,2"]
    code, _, err = cli("extract", *job, "--device", "cpu", "--out", tmp_path / "c")
    assert code == 0, err
    samples = PreparedSamples(tmp_path / "c" / "samples", 1)
    _, out, _ = looked(*options, "-n", "6", "--json")
    report = json.loads(out)
    counts = report["counts"]
    assert counts["dropped"] == dict(samples.dropped)
    assert {reason: found["rows"] for reason, found in counts["bad_rows"].items()} == {
        reason: found.rows for reason, found in samples.dropped.bad_rows.items()
    }
    assert (counts["rows"], counts["samples"], counts["tokens"]) == (6, len(samples), int(samples.num_tokens.sum()))
    assert counts["loss_tokens"] == int(samples.num_loss_tokens.sum())
    kept = [sample for row in report["rows"] for sample in row["samples"] if not sample["dropped"]]
    for number, sample in enumerate(kept):
        assert sample["input_ids"] == samples[number].input_ids.tolist()
        assert sample["loss_mask"] == samples[number].loss_mask.tolist()
    _, out, _ = looked(*options, "-n", "0")
    assert "dropped rows: 2 bad_row, 1 empty" in out
    assert "bad rows: 1 x is not JSON (first: mixed.jsonl row 2)" in out
    assert "--on-bad-row skip leaves such rows out" in out


def test_preview_takes_the_options_of_extract_that_decide_samples() -> None:
    """An option that extract gets and preview does not would show other samples than those that are stored."""
    of_states = {
        *("out", "scratch", "target_layers", "num_draft_layers", "capture", "dtype", "device", "devices", "device_map"),
        *("tp_plan", "attn_implementation", "compile", "deterministic", "on_nonfinite", "codec", "shard_size"),
        *("batch_tokens", "profile", "engine", "address", "num_workers", "gpus_per_worker", "adapter"),
        *("strict_hardware", "backend", "tensor_parallel", "pipeline_parallel", "expert_parallel"),
    }
    asked, looked_at = inspect.signature(extract).parameters, inspect.signature(preview).parameters
    assert set(asked) - of_states == set(looked_at) - {"rows", "row"}
    for name in set(asked) & set(looked_at):
        assert asked[name].default == looked_at[name].default
        assert asked[name].annotation == looked_at[name].annotation


@pytest.mark.parametrize(
    ("environment", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)]
)
def test_colour_is_for_terminals_that_want_it(
    environment: dict[str, str], coloured: bool, tiny_target: Path, data: Path
) -> None:
    """The real command at a real (pseudo) terminal."""
    ours, theirs = pty.openpty()
    name = os.ttyname(theirs)
    command = commands.start(
        *("preview", "--target", tiny_target, "--data", data, "-n", "1"),
        before=_on_terminal,
        **{"TERM": "xterm", "TEST_TERMINAL": name, **environment},
    )
    try:
        assert command.wait() == 0, command.stderr.read_text()
        out = os.read(ours, 1 << 20).decode().replace("\r\n", "\n")
    finally:
        os.close(ours)
        os.close(theirs)
    assert (f"{GREEN}Hi there<|im_end|>{RESET}\n" in out) == coloured
    assert ("[[Hi there<|im_end|>]]\n" in out) == (not coloured)
    assert ("\x1b" in out) == coloured


def _on_terminal() -> None:
    os.dup2(os.open(os.environ["TEST_TERMINAL"], os.O_RDWR | os.O_NOCTTY), 1)


# -- text -------------------------------------------------------------------------------------------------------------


def test_stretches_together_are_the_whole_text(tiny_target: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_target)
    text = "one two  three\n\n日本語 🙂 four"
    ids = np.asarray(tokenizer(text)["input_ids"])
    for start, stop in ((0, len(ids)), (3, 9), (5, 5)):
        mask = (np.arange(len(ids)) // 3 % 2).astype("u1")
        found = stretches(tokenizer, ids, mask, start, stop)
        assert all(first.learned != second.learned for first, second in itertools.pairwise(found))
    assert "".join(part.text for part in stretches(tokenizer, ids, 0 * mask)) == text


def test_white_space_at_the_ends_of_what_is_learned_can_be_seen_in_colour() -> None:
    learned = [Stretch("a:", False), Stretch(" yes\n no \n", True)]
    assert painted(learned, True) == f"a:{GREEN}·yes{RESET}\n{GREEN} no·↵{RESET}\n"
    assert painted(learned, False) == "a:[[ yes\n no \n]]"
    assert "8 characters" in painted([Stretch("abcdefghijkl", True)], False, 4)


def test_what_is_printed() -> None:
    assert printable("é 日本\n\tok") == "é 日本\n\tok"
    assert printable("\x1b[2J\x9b\x00\u2028") == r"\x1b[2J\x9b\x00\u2028"
    assert one_line("a\nb\tc") == r"a\nb\tc"
