"""scripts/real_target.py: what it makes of a GGUF file, and that a second run finds it; fetching is pip's business."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import real_target
import torch
from tiny_gguf import write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from cache_format import FeatureCache


@pytest.fixture(scope="module")
def made(tiny_target, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gguf") / "made"
    write_gguf(tiny_target, folder)
    return folder


def test_a_gguf_file_becomes_a_target_folder_that_is_extracted(made, tmp_path, cli, monkeypatch):
    monkeypatch.setattr(real_target, "fetch_gguf", lambda scratch: made / "model.gguf")
    out = real_target.real_target(tmp_path / "targets" / "real")
    model = AutoModelForCausalLM.from_pretrained(out)
    rounded = AutoModelForCausalLM.from_pretrained(made / "rounded", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    for name, weight in rounded.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    assert AutoTokenizer.from_pretrained(out)("hello there")["input_ids"]
    assert [path.name for path in out.parent.iterdir()] == ["real"], "nothing is left beside it"

    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"input_ids": [*range(9, 30 + n)]}) + "\n" for n in range(4)))
    options = ("--target-layers", "0,2", "--loss-on", "all", "--device", "cpu", "--out", tmp_path / "cache")
    assert cli("extract", "--target", out, "--data", rows, *options)[0] == 0
    assert len(FeatureCache.open(tmp_path / "cache")) == 4

    def not_again(scratch: Path) -> Path:
        raise AssertionError("it is there")

    monkeypatch.setattr(real_target, "fetch_gguf", not_again)
    assert real_target.real_target(out) == out


def test_a_fetch_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def broken(scratch: Path) -> Path:
        raise OSError("no network")

    monkeypatch.setattr(real_target, "fetch_gguf", broken)
    with pytest.raises(OSError, match="no network"):
        real_target.real_target(tmp_path / "real")
    assert not [*tmp_path.iterdir()]
