"""import: another project's offline cache becomes ours, bit for bit, or is refused before anything is written."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import random
import shutil
import zipfile
from contextlib import contextmanager
from pathlib import Path

import commands
import numpy as np
import pytest
import soak_kill
import torch
from jobs import contents

from cache_format import CacheError, FeatureCache
from cache_format.export import LAYOUTS, export
from cache_format.layout.manifest import Manifest
from cache_format.layout.shard_layout import shard_name
from cache_format.peers import PEERS
from cache_format.peers.torch_file import TorchFile
from cache_format.storage.lock import writing

ASKED = {
    "deepspec": ["--last-layer", "pre-norm"],
    "specforge": ["--target-layers", "0,2,5", "--last-layer", "pre-norm"],
    "speculators": ["--target-layers", "0,2,5", "--last-layer", "pre-norm"],
    "modelopt": ["--target-layers", "0,2,5", "--last-layer", "post-norm"],
    "angelslim": ["--target-layers", "0,2,5", "--last-layer", "post-norm"],
}
"""What each layout does not say of the cache below; of its six layers the last is 5."""


@pytest.fixture(scope="module")
def source(job, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("import") / "cache"
    options = ["--target-layers", "0,2,5", "--capture", "last_hidden_states", "--dtype", "bfloat16", "--limit", "24"]
    commands.made("extract", *job, *options, "--shard-size", "1MiB", "--out", out)
    return out


@pytest.fixture(scope="module")
def peers(source, tmp_path_factory) -> dict[str, Path]:
    """The cache in every layout that can be read again."""
    folder = tmp_path_factory.mktemp("peers")
    for name in PEERS:
        export(FeatureCache.open(source), LAYOUTS[name], folder / name)
    return {name: folder / name for name in PEERS}


def arguments(peer: str, folder: Path, target: Path, out: Path, *more: object) -> list[object]:
    asked = more if "--target-layers" in more else [*ASKED[peer], *more]
    options = ["--device", "cpu", "--shard-size", "1MiB", "--recompute", "3"]
    return ["import", folder, "--from", peer, "--target", target, "--out", out, *options, *asked]


@pytest.fixture(scope="module")
def imported(peers, tiny_target, tmp_path_factory) -> Path:
    """From deepspec, by the command."""
    out = tmp_path_factory.mktemp("imported") / "cache"
    commands.made(*arguments("deepspec", peers["deepspec"], tiny_target, out))
    return out


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("peer", PEERS)
def test_there_and_back_is_the_same_to_the_bit(source, peers, tiny_target, cli, tmp_path, peer):
    out = tmp_path / "out"
    code, _, err = cli(*arguments(peer, peers[peer], tiny_target, out))
    assert (code, "recomputed 3 samples" in err) == (0, True), err
    before, after = FeatureCache.open(source), FeatureCache.open(out, verify="sample")
    layers = [0, 2] if peer in ("modelopt", "angelslim") else [0, 2, 5]
    assert after.target_layer_ids == layers
    assert after.manifest.capture["last_hidden_states"] == (peer != "speculators")
    kept = list(before)
    if peer == "specforge":  # its reader refuses the others, so they were not exported
        kept = [s for s in kept if (s.loss_mask[0][:-1] & s.loss_mask[0][1:]).any()]
    assert len(after) == len(kept) > 15
    for one, other in zip(kept, after, strict=True):
        assert same(other.input_ids, one.input_ids)
        assert same(other.loss_mask, one.loss_mask)
        assert same(other.hidden_states, one.hidden_states[..., : 64 * len(layers)])
        assert peer == "speculators" or same(other.last_hidden_states, one.last_hidden_states)
    ours, theirs = (json.loads((c / "manifest.json").read_text())["target"] for c in (out, source))
    assert ours == theirs
    stored = sorted(p.name for p in (source / "target").iterdir())
    assert stored == sorted(p.name for p in (out / "target").iterdir())
    assert all((out / "target" / name).read_bytes() == (source / "target" / name).read_bytes() for name in stored)
    code, told, err = cli("verify", out, "--recompute", 4, "--target", tiny_target)
    assert (code, "whole" in told) == (0, True), told + err


def test_it_says_where_it_is_from_and_no_other_command_goes_on_with_it(imported, job, cli, tmp_path):
    manifest = Manifest.read(imported)
    assert manifest.identity["imported_from"] == "deepspec"
    assert "dflash-cache import" in manifest.run_again
    before = contents(imported)
    code, _, err = cli("extract", *job, "--target-layers", "0,2,5", "--dtype", "bfloat16", "--out", imported)
    assert (code, "imported_from" in err) == (2, True), err
    data = job[job.index("--data") + 1]
    code, _, err = cli("append", imported, "--data", data, "--device", "cpu", "--out", imported.parent / "more")
    assert (code, "was imported from deepspec" in err) == (2, True), err
    assert contents(imported) == before
    code, _, err = cli("recode", imported, tmp_path / "z", "--codec", "zbits")
    assert (code, Manifest.read(tmp_path / "z").identity["imported_from"]) == (0, "deepspec"), err
    for command in (
        ["inspect", imported, "--all"],
        ["show", imported, "3"],
        ["report", imported],
    ):
        code, _, err = cli(*command)
        assert code == 0, err


def test_a_shard_that_is_lost_is_imported_again(imported, peers, tiny_target, cli, tmp_path):
    out = shutil.copytree(imported, tmp_path / "out")
    with open(out / shard_name(1), "r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(b"\xff" * 50)
    assert cli("verify", out)[0] == 1
    assert cli("repair", out)[0] == 1
    code, _, err = cli(*arguments("deepspec", peers["deepspec"], tiny_target, out))
    assert code == 0, err
    shutil.rmtree(out / "quarantine")
    assert contents(out) == contents(imported)


def test_killed_at_any_step_it_goes_on_to_the_same_bytes(imported, peers, tiny_target, tmp_path):
    wanted = list(map(str, arguments("deepspec", peers["deepspec"], tiny_target, tmp_path / "out")))
    for step in (2, 7, 15, 19, 22):
        if soak_kill.run(wanted, tmp_path / "log", die_at=step) == 0:
            break
    assert soak_kill.run(wanted, tmp_path / "log") == 0
    assert contents(tmp_path / "out") == contents(imported)


@pytest.mark.parametrize(
    ("peer", "options", "words"),
    [
        ("specforge", ["--target-layers", "0,2,5"], "--last-layer pre-norm or post-norm"),
        ("specforge", ["--target-layers", "0,2,3", "--last-layer", "pre-norm"], "leave it out"),
        ("specforge", ["--target-layers", "0,2"], "192 wide"),
        ("specforge", ["--target-layers", "0,2,6"], "layers of 0..5"),
        ("specforge", ["--target-layers", "0,2,2"], "each once"),
        ("deepspec", ["--target-layers", "0,2,4"], "says that it holds [0, 2, 5]"),
        ("modelopt", ["--target-layers", "0,2,5", "--out", "{peer}/inside"], "beside"),
    ],
)
def test_what_is_not_said_or_does_not_fit_is_refused_before_anything(
    peers, tiny_target, cli, tmp_path, peer, options, words
):
    options = [option.format(peer=peers[peer]) for option in options]
    before = contents(peers[peer])
    code, _, err = cli(*arguments(peer, peers[peer], tiny_target, tmp_path / "out", *options))
    assert (code, words in err) == (2, True), err
    assert not (tmp_path / "out").exists()
    assert contents(peers[peer]) == before


@pytest.mark.parametrize("peer", [name for name in PEERS if name != "deepspec"])
def test_layers_are_asked_for(peers, tiny_target, cli, tmp_path, peer):
    options = ["--from", peer, "--target", tiny_target, "--out", tmp_path / "out"]
    code, _, err = cli("import", peers[peer], *options)
    assert (code, "name them with --target-layers" in err) == (2, True), err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("peer", PEERS)
def test_a_folder_of_another_kind_is_refused(peers, tiny_target, cli, tmp_path, peer):
    (tmp_path / "empty").mkdir()
    others = [folder for name, folder in peers.items() if {name, peer} != {"specforge", "angelslim"} and name != peer]
    for folder in (tmp_path / "empty", tmp_path / "absent", *others):
        code, _, err = cli(*arguments(peer, folder, tiny_target, tmp_path / "out"))
        assert code in (1, 2), err
        assert "Traceback" not in err
        assert not (tmp_path / "out").exists()


def test_another_import_does_not_go_on_with_it(imported, peers, tiny_target, cli):
    before = contents(imported)
    for peer in ("specforge", "angelslim"):
        code, _, err = cli(*arguments(peer, peers[peer], tiny_target, imported))
        assert (code, "imported_from" in err) == (2, True), err
    code, _, err = cli(*arguments("deepspec", peers["deepspec"], tiny_target, imported, "--shard-size", "2MiB"))
    assert (code, "shard_bytes" in err) == (2, True), err
    assert contents(imported) == before


def test_another_import_that_ends_before_the_lock_is_held_is_left_alone(peers, tiny_target, cli, tmp_path, monkeypatch):
    out, before = tmp_path / "cache", {}

    @contextmanager
    def late(folder):
        commands.made(*arguments("deepspec", peers["deepspec"], tiny_target, out))
        before.update(contents(out))
        with writing(folder) as held:
            yield held

    monkeypatch.setattr("extractor.job.import_cache.writing", late)
    code, _, err = cli(*arguments("specforge", peers["specforge"], tiny_target, out))
    assert (code, "imported_from" in err) == (2, True), err
    assert before
    assert contents(out) == before


@pytest.mark.parametrize("folder", ["samples", "shards", "target"])
def test_a_link_in_out_leads_nowhere(peers, tiny_target, cli, tmp_path, folder):
    elsewhere, out = tmp_path / "elsewhere", tmp_path / "out"
    elsewhere.mkdir()
    (elsewhere / "samples-00007.arrow").write_bytes(b"somebody's")
    out.mkdir()
    (out / folder).symlink_to(elsewhere)
    code, _, err = cli(*arguments("deepspec", peers["deepspec"], tiny_target, out))
    assert (code, "leads out of the cache" in err) == (1, True), err
    assert contents(elsewhere) == {"samples-00007.arrow": b"somebody's"}


@pytest.mark.parametrize(("layers", "last"), [("2,0,5", "pre-norm"), ("0,2,5", "post-norm"), ("0,2,4", None)])
def test_states_that_are_not_the_targets_make_no_cache(peers, tiny_target, cli, tmp_path, layers, last):
    """Layers in another order, another layer: told after the first shard. A norm that was not there is told by the last
    hidden states that the files hold beside, before a shard is made."""
    out, options = tmp_path / "out", ["--target-layers", layers, *(["--last-layer", last] if last else [])]
    for _ in range(2):
        code, _, err = cli(*arguments("specforge", peers["specforge"], tiny_target, out, *options))
        assert code == 1, err
        assert "--last-layer" in err
        assert Manifest.read(out).state == "extracting"
        assert len(list((out / "shards").iterdir())) == (last != "post-norm")
        with pytest.raises(CacheError, match="not complete"):
            FeatureCache.open(out)


def test_unchecked_says_so(peers, tiny_target, cli, tmp_path):
    out = tmp_path / "out"
    code, _, err = cli(
        *arguments("specforge", peers["specforge"], tiny_target, out, "--unchecked", "--target-layers", "2,0,4")
    )
    assert (code, "nobody has compared" in err) == (0, True), err
    assert cli("verify", out)[0] == 0
    assert cli("verify", out, "--recompute", 3, "--target", tiny_target)[0] == 1


# -- what the projects' own writers do otherwise than our exports -----------------------------------------------------


def records(folder: Path) -> list[dict]:
    return [torch.load(path, weights_only=True) for path in sorted(folder.rglob("*.ckpt"))]


def test_specforge_as_its_own_script_writes(peers, tiny_target, cli, tmp_path):
    """``[1, S, ...]`` states, folders of 2,000 by number without zeros before, EAGLE-3's names."""
    folder = tmp_path / "peer"
    wanted = records(peers["specforge"])
    for i, record in enumerate(wanted):
        path = folder / f"rows_{i // 5 * 5}-{i // 5 * 5 + 5}" / f"data_{i}.ckpt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(
            {
                "input_ids": record["input_ids"],
                "loss_mask": record["loss_mask"].int(),
                "aux_hidden_state": record["hidden_states"][None],
                "hidden_state": record["target_last_hidden_states"][None],
            },
            path,
        )
    code, _, err = cli(*arguments("specforge", folder, tiny_target, tmp_path / "out"))
    assert code == 0, err
    for record, sample in zip(wanted, FeatureCache.open(tmp_path / "out"), strict=True):
        assert same(sample.input_ids[0], record["input_ids"])
        assert same(sample.hidden_states[0], record["hidden_states"])
        assert same(sample.last_hidden_states[0], record["target_last_hidden_states"])
    with open(folder / "rows_0-5" / "data_0.ckpt", "rb") as file:
        (folder / "rows_0-5" / "data_99.ckpt.gz").write_bytes(gzip.compress(file.read()))
    code, _, err = cli(*arguments("specforge", folder, tiny_target, tmp_path / "other"))
    assert (code, "gunzip -r" in err) == (2, True), err


def test_angelslim_padded_and_without_last_hidden_states(peers, tiny_target, cli, tmp_path):
    wanted = [{**r, "hidden_states": r["hidden_states"][..., :128].clone()} for r in records(peers["angelslim"])]
    (tmp_path / "peer").mkdir()
    for i, record in enumerate(wanted):
        length = record["input_ids"].shape[1]
        padded = {k: torch.nn.functional.pad(record[k], (0, 3)) for k in ("input_ids", "loss_mask")}
        padded["hidden_states"] = torch.nn.functional.pad(record["hidden_states"], (0, 0, 0, 3), value=1.0)
        padded["attention_mask"] = (torch.arange(length + 3) < length).long()[None]
        torch.save(padded, tmp_path / "peer" / f"sample_{i:08d}_rank0.ckpt")
    out = tmp_path / "out"
    code, _, err = cli(*arguments("angelslim", tmp_path / "peer", tiny_target, out, "--target-layers", "0,2"))
    assert code == 0, err
    cache = FeatureCache.open(out)
    assert not cache.manifest.capture["last_hidden_states"]
    for record, sample in zip(wanted, cache, strict=True):
        assert same(sample.input_ids, record["input_ids"])
        assert same(sample.hidden_states, record["hidden_states"])


def test_modelopt_states_before_the_norm_are_the_last_layers(source, tiny_target, cli, tmp_path):
    """A dump of vLLM: the states held apart are before the norm, so they are a layer of ours."""
    cache = FeatureCache.open(source)
    (tmp_path / "peer").mkdir()
    for i, sample in enumerate(cache):
        states = sample.hidden_states[0]
        record = {"input_ids": sample.input_ids[0], "loss_mask": sample.loss_mask[0].bool(), "conversation_id": f"c{i}"}
        torch.save(
            {
                **record,
                "hidden_states": states[:, 128:].clone(),
                "aux_hidden_states": states[:, :128].clone(),
                "hidden_states_prenorm": True,
            },
            tmp_path / "peer" / f"{i}.pt",
        )
    code, _, err = cli(
        *arguments("modelopt", tmp_path / "peer", tiny_target, tmp_path / "out", "--target-layers", "0,2")
    )
    assert code == 0, err
    after = FeatureCache.open(tmp_path / "out")
    assert (after.target_layer_ids, after.manifest.capture["last_hidden_states"]) == ([0, 2, 5], False)
    assert all(same(one.hidden_states, other.hidden_states) for one, other in zip(cache, after, strict=True))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"loss_mask": None}, "has no loss_mask"),
        ({"loss_mask": 0.5}, "other values than 0 and 1"),
        ({"input_ids": 5000}, "has token 5000"),
        ({"hidden_states": float("nan")}, "NaN or Inf"),
        ({"hidden_states": torch.float16}, "all alike"),
        ({"hidden_states": slice(1, None)}, "but its states are of shape"),
    ],
)
def test_a_sample_that_is_no_sample_is_named(peers, tiny_target, cli, tmp_path, change, words):
    folder = shutil.copytree(peers["specforge"], tmp_path / "peer")
    path = sorted(folder.rglob("*.ckpt"))[7]
    record = torch.load(path, weights_only=True)
    for name, value in change.items():
        if value is None:
            del record[name]
        elif isinstance(value, torch.dtype):
            record[name] = record[name].to(value)
        elif isinstance(value, slice):
            record[name] = record[name][value].clone()
        else:
            record[name] = record[name].to(torch.float32 if isinstance(value, float) and value == 0.5 else None)
            record[name][3] = value
    torch.save(record, path)
    out = tmp_path / "out"
    code, _, err = cli(*arguments("specforge", folder, tiny_target, out, "--unchecked"))
    assert (code in (1, 2), words in err) == (True, True), err
    assert not (out / "manifest.json").exists() or Manifest.read(out).state == "extracting"


def test_speculators_rows_without_states_are_told(peers, tiny_target, cli, tmp_path):
    folder = shutil.copytree(peers["speculators"], tmp_path / "peer")
    (folder / "hidden_states" / "hs_3.safetensors").unlink()
    code, _, err = cli(*arguments("speculators", folder, tiny_target, tmp_path / "out"))
    assert (code, "1 of 24 samples have no states (hidden_states/hs_3.safetensors)" in err) == (2, True), err
    one, other = (peers["speculators"] / "hidden_states" / f"hs_{n}.safetensors" for n in (3, 4))
    shutil.copy(other, folder / "hidden_states" / one.name)
    code, _, err = cli(*arguments("speculators", folder, tiny_target, tmp_path / "out"))
    assert (code, "hs_3.safetensors: is not of row 3" in err) == (1, True), err


# -- files of torch.save ----------------------------------------------------------------------------------------------


def saved(path: Path, value: object, **options: object) -> Path:
    torch.save(value, path, **options)
    return path


def test_plain_tensors_are_read_as_torch_reads_them(tmp_path):
    base = torch.arange(60).view(5, 12).float()
    record = {
        "view": base[1:4, 2:7],
        "turned": base.t(),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(7),
        "half": base.half(),
        "flags": torch.tensor([True, False]),
        "text": "x",
        "number": 3,
        "big": 1 << 40,
        "none": None,
    }
    with TorchFile(saved(tmp_path / "a.pt", record)) as file:
        for name, value in record.items():
            assert same(file.tensor(name), value) if isinstance(value, torch.Tensor) else file.record[name] == value
    with TorchFile(saved(tmp_path / "b.pt", {f"{n}": torch.full((2,), n) for n in range(600)})) as file:
        assert file.tensor("599").tolist() == [599, 599]


class Runs:
    def __reduce__(self):
        return (os.mkdir, ("it-ran",))


@pytest.mark.parametrize(
    "value",
    [
        {"a": Runs()},
        Runs(),
        torch.zeros(2),
        {"a": torch._neg_view(torch.ones(2))},
        {"a": np.zeros(2)},
        {"a": torch.nn.ReLU()},
    ],
)
def test_nothing_else_is_read_and_nothing_runs(tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    path = saved(tmp_path / "a.pt", value)
    with pytest.raises(CacheError, match="plain tensors"):
        TorchFile(path)
    assert not Path("it-ran").exists()


def test_other_containers_are_refused(tmp_path):
    record = {"a": torch.zeros(100)}
    old = saved(tmp_path / "old.pt", record, _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(record))
    (tmp_path / "short.pt").write_bytes(b"PK")
    whole = saved(tmp_path / "a.pt", record)
    with zipfile.ZipFile(whole) as archive, zipfile.ZipFile(tmp_path / "z.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in archive.namelist():
            packed.writestr(name, archive.read(name))
    with zipfile.ZipFile(whole) as archive, zipfile.ZipFile(tmp_path / "cut.pt", "w") as cut:
        for name in archive.namelist():
            cut.writestr(name, archive.read(name)[:50] if "/data/" in name else archive.read(name))
    for path in (old, *(tmp_path / f"{name}.pt" for name in ("plain", "short", "z", "cut"))):
        with pytest.raises(CacheError, match=str(path.name)):
            TorchFile(path)


def test_damage_is_an_error_and_never_anything_else(tmp_path):
    data = saved(tmp_path / "a.pt", {"a": torch.arange(50), "b": torch.ones(3, 4).bfloat16(), "c": True}).read_bytes()
    chance, path = random.Random(0), tmp_path / "b.pt"
    for _ in range(600):
        damaged = bytearray(data[: chance.randrange(len(data)) if chance.random() < 0.1 else None])
        for _ in range(chance.randrange(1, 4)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        path.write_bytes(damaged)
        try:
            with TorchFile(path) as file:
                for name in ("a", "b"):
                    assert file.tensor(name).numel() < 200
        except CacheError:
            pass
