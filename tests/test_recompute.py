"""verify --recompute judges each token in each layer: a massive first token hides none of the others."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cache_format.layout.manifest import Manifest
from cache_format.layout.shard_layout import shard_name
from cache_format.layout.shard_reader import ShardFile
from cache_format.upkeep.verify import verify
from cache_format.writing.seal import seal
from cache_format.writing.shard_buffer import ShardBuffer


@pytest.fixture(scope="module")
def target(tiny_target, tmp_path_factory) -> Path:
    """One whose first token of every sample has a state that dwarfs all others, as trained models have."""
    path = shutil.copytree(tiny_target, tmp_path_factory.mktemp("massive") / "target")
    weights = load_file(path / "model.safetensors")
    weights["model.embed_tokens.weight"][5] *= 3000
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def whole(target, tmp_path_factory) -> Path:
    from extractor.cli.app import app

    folder = tmp_path_factory.mktemp("recompute")
    rows = [{"input_ids": [5, *range(20 + n, 50 + n)], "loss_mask": [1] * 31} for n in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--target-layers", "1,3", "--shard-size", "64KiB", "--device", "cpu", "--out", str(folder / "c")]
    arguments = ["extract", "--target", str(target), "--data", str(folder / "rows.jsonl"), *options]
    app(arguments, standalone_mode=False)
    return folder / "c"


def zeroed(states: torch.Tensor) -> None:
    states[1:] = 0


def shuffled(states: torch.Tensor) -> None:
    states[1:] = states[1:].flip(0)


def one_token_zeroed(states: torch.Tensor) -> None:
    states[-1] = 0


def scaled(states: torch.Tensor) -> None:
    states[1:] *= 1.05


def not_a_number(states: torch.Tensor) -> None:
    states[7, 3] = float("nan")


def rewritten(cache: Path, damage) -> None:
    """Every sample's rows of the second layer are damaged; all checksums are right."""
    manifest = Manifest.read(cache)
    schema = manifest.schema()
    assert manifest.totals is not None
    for number in range(manifest.totals.shards):
        path = cache / shard_name(number)
        with ShardFile(path, schema, number) as shard:
            ids, starts = shard.sample_ids, shard.cu_seqlens
        stored, buffer = load_file(path), ShardBuffer(10 << 20)
        buffer.begin(schema, number, ids, starts[1:] - starts[:-1])
        states = stored["hidden_states"].view(len(stored["hidden_states"]), 2, -1)
        if damage == "of another sample":
            states[:, 1] = states[:, 1].roll(31, 0)
        else:
            for low, high in pairwise(starts):
                damage(states[low:high, 1])
        for name in ("input_ids", "loss_mask", "hidden_states"):
            buffer.tensor(name).copy_(stored[name])
        buffer.commit(path)
    files = {name: info for name, info in manifest.files.items() if name not in ("index.arrow", "shards.arrow")}
    seal(cache, replace(manifest, files=files))


def test_first_tokens_are_massive_and_the_cache_is_right(whole, target, cli):
    code, out, err = cli("verify", whole, "--recompute", "8", "--target", target, "--device", "cpu", "--json")
    assert code == 0, out + err
    report = json.loads(out)["recompute"]
    assert (report["tokens"], sorted(report["layers"])) == (8 * 31, ["1", "3"])
    assert report["layers"]["3"]["worst"] < 1e-4
    with ShardFile(whole / shard_name(0), Manifest.read(whole).schema(), 0):
        states = load_file(whole / shard_name(0))["hidden_states"].view(-1, 2, 64)[:31, 1].norm(dim=-1)
    assert states[0] > 50 * states[1:].median()


@pytest.mark.parametrize(
    "damage",
    [zeroed, shuffled, one_token_zeroed, scaled, not_a_number, "of another sample"],
    ids=lambda damage: getattr(damage, "__name__", damage),
)
def test_damage_of_one_layer_behind_a_massive_first_token_is_found(whole, target, cli, tmp_path, damage):
    cache = shutil.copytree(whole, tmp_path / "c")
    rewritten(cache, damage)
    assert verify(cache).whole
    code, out, _ = cli("verify", cache, "--recompute", "8", "--target", target, "--device", "cpu", "--json")
    problems = json.loads(out)["problems"]
    assert code == 1
    assert {problem["sample"] for problem in problems} == set(range(8)), "not a sample passes"
    assert all("layer 3 is not what the target gives" in problem["problem"] for problem in problems)


@pytest.mark.parametrize("codec", ["quant", "quant:fine"])
def test_what_a_coarse_codec_may_change_hides_no_damage(whole, target, cli, tmp_path, codec):
    """Its error is allowed; another token's state, a token of zeros, or a layer that is 5 % too large is not."""
    assert cli("recode", whole, tmp_path / "right", "--codec", codec)[0] == 0
    checked = ("--recompute", "8", "--target", target, "--device", "cpu", "--json")
    code, out, err = cli("verify", tmp_path / "right", *checked)
    assert code == 0, out + err
    for damage in (shuffled, one_token_zeroed, scaled, "of another sample"):
        name = getattr(damage, "__name__", "other")
        wrong = shutil.copytree(whole, tmp_path / name)
        rewritten(wrong, damage)
        assert cli("recode", wrong, tmp_path / f"{name}-coded", "--codec", codec)[0] == 0
        code, out, _ = cli("verify", tmp_path / f"{name}-coded", *checked)
        assert (code, {problem["sample"] for problem in json.loads(out)["problems"]}) == (1, set(range(8))), name
