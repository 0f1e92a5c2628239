"""A target in GGUF gives the states of its dequantised weights, is told by its bytes, and is named in three ways."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import commands
import pytest
import torch
from jobs import contents
from tiny_gguf import write_gguf

from cache_format import FeatureCache
from cache_format.errors import InputError
from extractor.target.gguf_file import joined_name, place_and_file
from extractor.target.load_target import load_config
from extractor.target.target_identity import identify_target


@pytest.fixture(scope="module")
def made(once, tiny_target) -> Path:
    return once("gguf", lambda path: write_gguf(tiny_target, path))


@pytest.fixture(scope="module")
def folder(made, tmp_path_factory) -> Path:
    """With the GGUF file alone."""
    path = tmp_path_factory.mktemp("folder") / "gguf"
    path.mkdir()
    shutil.copy(made / "model.gguf", path)
    return path


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """Of token ids: how words are split is the business of transformers' tokenizers."""
    path = tmp_path_factory.mktemp("rows") / "ids.jsonl"
    lines = [
        {"input_ids": [(7 * n + k * k) % 500 for k in range(20 + n)], "loss_mask": [1] * (20 + n)} for n in range(8)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def arguments(data: Path) -> list[object]:
    return [
        *("--data", data, "--device", "cpu", "--target-layers", "0,2", "--limit", "8", "--max-length", "64"),
        *("--dtype", "float32", "--shard-size", "1MiB"),
    ]


def test_the_cache_is_that_of_the_dequantised_weights(made, folder, rows, tmp_path):
    job = arguments(rows)
    code, _, said = commands.run("extract", "--target", made / "model.gguf", *job, "--out", tmp_path / "file")
    assert code == 0, said
    assert "its GGUF blocks are dequantised to float32" in said
    commands.made("extract", "--target", made / "rounded", *job, "--out", tmp_path / "rounded")
    ours, right = FeatureCache.open(tmp_path / "file"), FeatureCache.open(tmp_path / "rounded")
    assert len(ours) == len(right) == 8
    for one, other in zip(ours, right, strict=True):
        assert torch.equal(one.input_ids, other.input_ids)
        assert torch.equal(one.loss_mask, other.loss_mask)
        torch.testing.assert_close(one.hidden_states, other.hidden_states, rtol=1e-5, atol=1e-5)
    assert torch.equal(ours.get_input_embeddings().weight, right.get_input_embeddings().weight)
    code, _, errors = commands.run(
        "verify", tmp_path / "file", "--recompute", "3", "--target", made / "model.gguf", "--device", "cpu"
    )
    assert code == 0, errors
    code, _, errors = commands.run("extract", "--target", folder, *job, "--out", tmp_path / "file")
    assert code == 0, errors
    assert "already complete" in errors, "a folder with the file alone is the same target"


def test_another_file_is_another_target(folder, rows, tmp_path, cli):
    job = ["extract", "--target", folder, *arguments(rows), "--out", tmp_path / "cache"]
    commands.made(*job)
    before = contents(tmp_path / "cache")
    damaged = shutil.copytree(folder, tmp_path / "changed") / "model.gguf"
    data = bytearray(damaged.read_bytes())
    data[-40] ^= 1
    damaged.write_bytes(data)
    code, _, errors = cli("extract", "--target", damaged.parent, *arguments(rows), "--out", tmp_path / "cache")
    assert code == 2
    assert "target.weights: cache has" in errors
    assert contents(tmp_path / "cache") == before


def test_the_identity_is_of_the_files_bytes(folder, tmp_path):
    moved = shutil.copytree(folder, tmp_path / "moved")
    (moved / "readme.md").write_text("of no account")
    fields = [identify_target(name, None, load_config(name, None, False)).fields for name in (str(folder), str(moved))]
    assert fields[0] == fields[1]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("{folder}", ("{folder}", "model.gguf")),
        ("{folder}/model.gguf", ("{folder}", "model.gguf")),
        ("{made}/rounded", ("{made}/rounded", None)),
        ("owner/name", ("owner/name", None)),
        ("owner/name/model-Q4_K_M.gguf", ("owner/name", "model-Q4_K_M.gguf")),
        ("owner/name/Q4/model.gguf", ("owner/name", "Q4/model.gguf")),
    ],
)
def test_what_a_name_stands_for(folder, made, name, expected):
    places = {"folder": folder, "made": made}
    place, file = expected
    assert place_and_file(name.format(**places)) == (place.format(**places), file)


def test_refused_with_the_way_out(folder, rows, tmp_path, cli):
    several = shutil.copytree(folder, tmp_path / "several")
    shutil.copy(folder / "model.gguf", several / "other.gguf")
    job = [*arguments(rows), "--out", tmp_path / "cache"]
    code, _, errors = cli("extract", "--target", several, *job)
    assert (code, "choose one with --gguf-file: model.gguf, other.gguf" in errors) == (2, True), errors
    code, _, errors = cli("extract", "--target", several, "--gguf-file", "third.gguf", *job)
    assert (code, "third.gguf: no such file" in errors) == (2, True), errors
    part = shutil.copytree(folder, tmp_path / "parts") / "m-00001-of-00002.gguf"
    (part.parent / "model.gguf").rename(part)
    code, _, errors = cli("extract", "--target", part, *job)
    assert (code, "llama-gguf-split --merge" in errors) == (2, True), errors
    code, _, errors = cli("extract", "--target", folder, "--backend", "vllm", *job)
    assert (code, "--backend vllm takes no GGUF" in errors) == (2, True), errors
    broken = tmp_path / "broken.gguf"
    for content in (b"", b"GGUF", b"GGUF" + bytes(60), (folder / "model.gguf").read_bytes()[:5000]):
        broken.write_bytes(content)
        code, _, errors = cli("extract", "--target", broken, *job)
        assert code == 2, errors
        assert "broken.gguf" in errors
        assert "Traceback" not in errors
    assert not (tmp_path / "cache").exists()


def test_a_file_of_a_folder_is_one_name(folder):
    assert joined_name("owner/name", "a.gguf") == "owner/name/a.gguf"
    assert joined_name("owner/name", None) == "owner/name"
    for target, file in (("owner/name", "a.bin"), ("owner/name", "../a.gguf"), ("a/b.gguf", "c.gguf")):
        with pytest.raises(InputError, match="--gguf-file"):
            joined_name(target, file)


def test_a_conversation_is_rendered_by_the_template_in_the_file(folder, demo_jsonl, tmp_path):
    options = ["--limit", "4", "--max-length", "64", "--device", "cpu", "--target-layers", "0"]
    commands.made("extract", "--target", folder, "--data", demo_jsonl, *options, "--out", tmp_path / "cache")
    sample = FeatureCache.open(tmp_path / "cache")[0]
    assert 0 < sample.loss_mask.sum() < sample.loss_mask.numel()
