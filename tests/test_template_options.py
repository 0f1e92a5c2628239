"""Options that decide what a chat template writes: part of the identity, kept by a resume, checked before work."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from cache_format import FeatureCache
from cache_format.layout.manifest import Manifest

DATED = (
    "{{- 'Today is ' + strftime_now('%d %B %Y') + '. ' + (mood or '') }}{% for m in messages %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROWS = [
    {"messages": [{"role": r, "content": f"{r} {n}"} for n in (1, 2) for r in ("user", "assistant")]} for _ in range(3)
]


@pytest.fixture
def dated(tmp_path: Path, cli: Any, job: list[Any]) -> Any:
    """Runs a command over three rows with a template that writes the date; the text of sample 0, or the error."""
    (tmp_path / "dated.jinja").write_text(DATED)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    target = job[job.index("--target") + 1]

    def run(out: str, *more: str) -> str:
        code, _, err = cli(
            *("extract", "--target", target, "--data", tmp_path / "rows.jsonl", "--target-layers", "0"),
            *("--chat-template", tmp_path / "dated.jinja", "--device", "cpu", "--out", tmp_path / out, *more),
        )
        if code:
            return f"{code}: {err}"
        cache = FeatureCache.open(tmp_path / out)
        return AutoTokenizer.from_pretrained(target).decode(cache[0].input_ids[0])

    return run


def test_the_date_is_that_of_the_day_on_which_the_cache_was_begun(dated: Any, tmp_path: Path) -> None:
    assert dated("today").startswith(f"Today is {date.today():%d %B %Y}.")
    assert dated("other", "--template-date", "2025-12-24").startswith("Today is 24 December 2025.")
    # The next day: samples and shards are lost, and made again as they were.
    cache = tmp_path / "other"
    manifest = Manifest.read(cache)
    assert manifest.identity["template_date"] == "2025-12-24"
    before = [path.read_bytes() for path in sorted((cache / "shards").iterdir())]
    for path in (cache / "shards").iterdir():
        path.unlink()
    (cache / "index.arrow").unlink()
    (cache / "shards.arrow").unlink()
    files = {name: info for name, info in manifest.files.items() if name not in ("index.arrow", "shards.arrow")}
    replace(manifest, state="extracting", files=files).write(cache)
    assert dated("other").startswith("Today is 24 December 2025.")
    assert [path.read_bytes() for path in sorted((cache / "shards").iterdir())] == before


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (["--template-date", "2025-12-25"], "template_date"),
        (["--turns", "each"], "turns"),
        (["--system-prompt", "Be kind."], "system_prompt"),
        (["--chat-template-kwargs", '{"mood": "good"}'], "chat_template_kwargs"),
        (["--chat-template", "other.jinja"], "chat_template"),
    ],
)
def test_a_resume_with_others_is_refused(
    dated: Any, tmp_path: Path, options: list[str], field: str, monkeypatch
) -> None:
    (tmp_path / "other.jinja").write_text(DATED + " ")
    dated("cache", "--template-date", "2025-12-24")
    shutil.rmtree(tmp_path / "cache" / "shards")
    options = [str(tmp_path / option) if option.endswith(".jinja") else option for option in options]
    if field != "template_date":
        options += ["--template-date", "2025-12-24"]
    problem = dated("cache", *options)
    assert field in problem
    assert "differ" in problem or "other" in problem


def test_variables_reach_the_template_and_each_turn_is_a_sample(dated: Any, tmp_path: Path) -> None:
    text = dated(
        "cache", "--turns", "each", "--chat-template-kwargs", '{"mood": "Smile!"}', "--system-prompt", "Be kind."
    )
    assert "Smile!<|im_start|>system\nBe kind.<|im_end|>" in text
    assert "user 2" not in text
    assert len(FeatureCache.open(tmp_path / "cache")) == 2 * len(ROWS)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--template-date", "24.12.2025"], "--template-date"),
        (["--chat-template-kwargs", "[1]"], "not a JSON object"),
        (["--chat-template-kwargs", "{"], "not JSON"),
        (["--chat-template-kwargs", '{"messages": []}'], "'messages'"),
        (["--chat-template", "no-such.jinja"], "no such file"),
        (["--turns", "some"], "is not one of"),
    ],
)
def test_nonsense_is_refused_before_anything_is_made(
    dated: Any, tmp_path: Path, options: list[str], words: str
) -> None:
    problem = dated("cache", *options)
    assert problem.startswith("2: ")
    assert words in problem
    assert not (tmp_path / "cache").exists()


def test_a_token_beyond_the_targets_embedding_is_a_bad_row(tmp_path: Path, cli: Any, job: list[Any]) -> None:
    target = shutil.copytree(job[job.index("--target") + 1], tmp_path / "target")
    tokenizer = AutoTokenizer.from_pretrained(target)
    tokenizer.add_tokens([f"<new{n}>" for n in range(4000)])
    tokenizer.save_pretrained(target)
    beyond = len(tokenizer) - 1
    assert beyond >= json.loads((target / "config.json").read_text())["vocab_size"]
    answers = [f"Take <new{3999}>", "Take it"]
    rows = [{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": a}]} for a in answers]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["extract", "--target", target, "--data", tmp_path / "rows.jsonl", "--target-layers", "0"]
    code, _, err = cli(*command, "--device", "cpu", "--out", tmp_path / "cache")
    assert code == 2
    assert f"rows.jsonl row 1: the token {beyond} ('<new3999>') is beyond the target's embedding" in err
    code, _, err = cli(*command, "--device", "cpu", "--out", tmp_path / "cache", "--on-bad-row", "skip")
    assert code == 0, err
    assert len(FeatureCache.open(tmp_path / "cache")) == 1
