"""preview and show: what people look at is what is stored, said for a terminal, a pipe and a program."""

from __future__ import annotations

import inspect
import itertools
import json
import os
import pty
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import commands
import numpy as np
import pytest
from transformers import AutoTokenizer

from cache_format import FeatureCache
from cache_format.layout.samples import PreparedSamples
from extractor.cli.extract import extract
from extractor.cli.option_groups import spread
from extractor.cli.preview import preview
from extractor.data.stretches import stretches
from extractor.job.show import LayerNorms, Shown, describe
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
    assert "messages from messages" in out
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
        "experts_implementation",
        *("tp_plan", "attn_implementation", "compile", "deterministic", "on_nonfinite", "codec", "shard_size"),
        *("batch_tokens", "profile", "engine", "address", "num_workers", "gpus_per_worker", "adapter"),
        *("keep", "epochs", "strict_hardware", "backend", "tensor_parallel", "pipeline_parallel", "expert_parallel"),
    }
    asked, looked_at = (inspect.signature(spread(command)).parameters for command in (extract, preview))
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


# -- show -------------------------------------------------------------------------------------------------------------


def test_a_sample_of_a_cache_its_row_and_its_norms(cli: Any, made: Path, demo_jsonl: Path) -> None:
    cache, samples = FeatureCache.open(made), PreparedSamples(made / "samples", 1)
    code, out, err = cli("show", made, "17", "--json")
    assert (code, err) == (0, "")
    shown = json.loads(out)
    assert shown["input_ids"] == samples[17].input_ids.tolist() == cache[17].input_ids[0].tolist()
    assert shown["loss_mask"] == samples[17].loss_mask.tolist()
    assert shown["source"] == f"train.jsonl row {samples[17].source_row + 1}"
    tokenizer = AutoTokenizer.from_pretrained(made / "target")
    assert "".join(part["text"] for part in shown["text"]) == tokenizer.decode(shown["input_ids"])
    states = cache[17].hidden_states[0].double().view(len(shown["input_ids"]), len(cache.target_layer_ids), -1)
    for layer, norms in enumerate(shown["norms"]):
        expected = states[:, layer].norm(dim=1)
        assert norms["layer"] == cache.target_layer_ids[layer]
        assert norms["first"] == pytest.approx(float(expected[0]), rel=1e-5)
        assert norms["median"] == pytest.approx(float(expected.median()), rel=1e-5)
        assert norms["largest"] == pytest.approx(float(expected.max()), rel=1e-5)
        assert norms["largest_at"] == int(expected.argmax())
    _, out, _ = cli("show", made, "17")
    assert f"made from train.jsonl row {samples[17].source_row + 1}\n" in out
    assert out.count("[[") == sum(part["learned"] for part in shown["text"])


def test_a_sample_is_the_one_that_preview_shows(cli: Any, made: Path, job: list[str]) -> None:
    _, out, _ = cli("show", made, "3", "--json")
    shown = json.loads(out)
    data_and_length = [*job[:4], "--max-length", "256"]
    _, out, _ = cli("preview", *data_and_length, "--row", shown["source"], "--json")
    [sample] = json.loads(out)["rows"][0]["samples"]
    assert (sample["input_ids"], sample["text"]) == (shown["input_ids"], shown["text"])


def test_some_tokens_of_a_sample(cli: Any, made: Path) -> None:
    whole = json.loads(cli("show", made, "5", "--json")[1])
    some = json.loads(cli("show", made, "5", "--from", "7", "--to", "20", "--json")[1])
    assert some["input_ids"] == whole["input_ids"][7:20]
    assert some["norms"] == whole["norms"]
    assert "".join(p["text"] for p in some["text"]) in "".join(p["text"] for p in whole["text"])
    assert json.loads(cli("show", made, "5", "--to", "99999", "--json")[1]) == whole


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [(["99999"], "there is no sample 99999; it has 0 to "), (["5", "--from", "9999"], "--from 9999"), (["-1"], "-1")],
)
def test_a_sample_that_is_not_there_is_refused(arguments: list[str], problem: str, cli: Any, made: Path) -> None:
    code, out, err = cli("show", made, *arguments)
    assert (code, out) == (2, "")
    assert problem in err
    assert "Traceback" not in err


def test_a_damaged_cache_is_shown_as_far_as_it_goes(cli: Any, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "c")
    (tmp_path / "c" / "target" / "tokenizer.json").write_text("{}")
    (tmp_path / "c" / "samples" / "samples-00000.arrow").write_bytes(b"x")
    code, out, _ = cli("show", tmp_path / "c", "5", "--to", "9")
    assert code == 0
    assert "token ids, since" in out
    assert "samples/ is damaged" in out
    assert str(json.loads(cli("show", made, "5", "--json")[1])["input_ids"][8]) in out
    shard = tmp_path / "c" / "shards" / "shard-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    codes = {cli("show", tmp_path / "c", str(number))[0] for number in FeatureCache.open(made).index.sample_id}
    assert codes == {0, 2}


def test_foreign_names_in_a_cache_do_nothing_to_a_terminal() -> None:
    stretch = [Stretch("\x1b]0;x\x07", True)]
    norms = [LayerNorms(layer=0, median=1.0, first=2.0, largest=3.0, largest_at=0)]
    shown = Shown(
        cache="c\x1b[2J", sample_id=0, source="a\x1b[1m\nrow 1", shard=0, tokens=1, learned=1, start=0, stop=1,
        input_ids=[1], loss_mask=[1], text=stretch, problem="\x9b1m", norms=norms,
    )  # fmt: skip
    for each in (shown, replace(shown, problem="")):
        assert not [c for c in describe(each, False) if not c.isprintable() and c != "\n"]


def test_a_cache_of_several_sources_says_which_sample_is_from_where(
    cli: Any, tmp_path: Path, tiny_target: Path
) -> None:
    (tmp_path / "b").mkdir()
    rows = {
        name: [{"prompt": f"{name} {n}", "response": "yes " * n} for n in range(1, 41)] for name in ("a", "b/c", "b/d")
    }
    for name, content in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    data = ["--data", f"{tmp_path / 'a.jsonl'}:0.5", "--data", tmp_path / "b"]
    out = tmp_path / "cache"
    job = ["--target", tiny_target, *data, "--out", out, "--device", "cpu", "--target-layers", "0,2"]
    code, _, err = cli("extract", *job)
    assert code == 0, err
    summary = json.loads(cli("inspect", out, "--json")[1])
    first, second = summary["data"]["sources"]
    assert second["samples"] == 80
    assert 10 < first["samples"] < 30
    assert first["samples"] + second["samples"] == summary["totals"]["samples"]
    assert first["tokens"] + second["tokens"] == summary["totals"]["tokens"]
    for number in (0, first["samples"] - 1, first["samples"], summary["totals"]["samples"] - 1):
        shown = json.loads(cli("show", out, str(number), "--json")[1])
        name, row = shown["source"].rsplit(" row ", 1)
        expected = rows[next(key for key in rows if f"{key}.jsonl" in name)][int(row) - 1]["prompt"]
        assert expected in "".join(part["text"] for part in shown["text"])
        args = ("preview", "--target", tiny_target, *data, "--row", shown["source"], "--json")
        [sample] = json.loads(cli(*args)[1])["rows"][0]["samples"]
        assert sample["input_ids"] == shown["input_ids"]
