"""export: the files are what each project's reader demands, hold what the cache holds, and survive a kill."""

from __future__ import annotations

import json
import shutil
import signal
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import commands
import numpy as np
import pytest
import torch
from jobs import contents
from safetensors import safe_open
from safetensors.torch import load_file
from synthetic import write_cache

from cache_format import CacheError, FeatureCache, InputError
from cache_format.export import LAYOUTS, export, plan_export
from cache_format.layout.manifest import Manifest

LAYERS = [0, 2, 5]
"""Of the tiny target's six: the last among them, so that every layout can be written."""


@pytest.fixture(scope="session")
def source(job, tmp_path_factory) -> Path:
    """A cache with last_hidden_states and the target's last layer, bfloat16, in a few shards."""
    out = tmp_path_factory.mktemp("export") / "cache"
    options = ["--target-layers", "0,2,5", "--capture", "last_hidden_states", "--dtype", "bfloat16", "--limit", "40"]
    commands.made("extract", *job, *options, "--shard-size", "1MiB", "--out", out)
    assert Manifest.read(out).totals.shards > 2
    return out


@pytest.fixture(scope="session")
def exported(source, tmp_path_factory) -> dict[str, Path]:
    """The cache in every layout."""
    folder = tmp_path_factory.mktemp("exported")
    cache = FeatureCache.open(source)
    for name, layout in LAYOUTS.items():
        export(cache, layout, folder / name)
    return {name: folder / name for name in LAYOUTS}


def last_normed(sample) -> torch.Tensor:
    """hidden_states with the last layer's block after the norm, as transformers has it."""
    return torch.cat([sample.hidden_states[0][:, :128], sample.last_hidden_states[0]], dim=1)


def same(tensor: torch.Tensor, expected: torch.Tensor) -> bool:
    return tensor.dtype == expected.dtype and torch.equal(tensor, expected)


def test_specforge_files(source, exported):
    cache = FeatureCache.open(source)
    files = sorted(exported["specforge"].rglob("*.ckpt"))
    assert len(files) == len(cache)
    for sample, path in zip(cache, files, strict=True):
        record = torch.load(path, weights_only=True, mmap=True)
        assert set(record) == {"input_ids", "loss_mask", "hidden_states", "target_last_hidden_states"}
        assert same(record["input_ids"], sample.input_ids[0])
        assert same(record["loss_mask"], sample.loss_mask[0])
        assert same(record["hidden_states"], sample.hidden_states[0])
        assert same(record["target_last_hidden_states"], sample.last_hidden_states[0])
        assert path.stat().st_size < sum(t.nbytes for t in record.values()) + 4096, "nothing but the sample"


def test_modelopt_files(source, exported):
    cache = FeatureCache.open(source)
    files = sorted(exported["modelopt"].rglob("*.pt"))
    assert len(files) == len(cache)
    for sample, path in zip(cache, files, strict=True):
        record = torch.load(path, weights_only=True)
        assert same(record["input_ids"], sample.input_ids[0])
        assert same(record["loss_mask"], sample.loss_mask[0])
        assert same(record["hidden_states"], sample.last_hidden_states[0])
        assert same(record["aux_hidden_states"], last_normed(sample))
        assert record["hidden_states_prenorm"] is False


def test_speculators_files(source, exported):
    from datasets import load_from_disk

    cache, out = FeatureCache.open(source), exported["speculators"]
    rows = load_from_disk(out)
    assert (len(rows), rows.format["type"]) == (len(cache), "torch")
    assert {p.name for p in (out / "hidden_states").iterdir()} == {f"hs_{i}.safetensors" for i in range(len(cache))}
    for i, (sample, row) in enumerate(zip(cache, rows, strict=True)):
        stored = load_file(out / "hidden_states" / f"hs_{i}.safetensors")
        length = sample.input_ids.shape[1]
        assert row["seq_len"] == length
        assert same(row["input_ids"], sample.input_ids[0])
        assert same(row["loss_mask"], sample.loss_mask[0])
        assert same(stored["token_ids"], sample.input_ids[0])
        assert same(stored["hidden_states"], sample.hidden_states[0].reshape(length, 3, 64))


def test_angelslim_files(source, exported):
    cache = FeatureCache.open(source)
    files = sorted(exported["angelslim"].rglob("*.ckpt"))
    assert len(files) == len(cache)
    for sample, path in zip(cache, files, strict=True):
        record = torch.load(path, weights_only=True)
        assert set(record) == {"input_ids", "loss_mask", "hidden_states", "target_hiddens"}
        assert same(record["input_ids"], sample.input_ids)
        assert same(record["loss_mask"], sample.loss_mask)
        assert same(record["hidden_states"][0], last_normed(sample))
        assert same(record["target_hiddens"], sample.last_hidden_states)


def test_some_layers_in_another_dtype(source, cli, tmp_path):
    """What a draft does not want is not exported; of speculators the last layer is beside what it wants."""
    cache = FeatureCache.open(source)
    options = ["--layers", "2,0", "--dtype", "float32"]
    for name, ending, field in (("specforge", "ckpt", "hidden_states"), ("modelopt", "pt", "aux_hidden_states")):
        code, _, err = cli("export", source, "--to", name, tmp_path / name, *options)
        assert (code, "target_layer_ids = [2, 0]" in err) == (0, True), err
        for sample, path in zip(cache, sorted((tmp_path / name).rglob(f"*.{ending}")), strict=True):
            states = sample.hidden_states[0].float()
            got = torch.load(path, weights_only=True)[field]
            assert same(got, torch.cat([states[:, 64:128], states[:, :64]], dim=1))
    code, _, err = cli("export", source, "--to", "speculators", tmp_path / "s", "--layers", "2")
    assert (code, "--target-layer-ids 3 " in err) == (0, True), err
    stored = load_file(tmp_path / "s" / "hidden_states" / "hs_3.safetensors")["hidden_states"]
    assert same(stored.flatten(1), cache[3].hidden_states[0][:, 64:])


def test_an_export_is_not_mixed_with_one_of_other_layers(source, cli, tmp_path):
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert cli("export", source, "--to", "specforge", out, "--layers", "2,0")[0] == 0
    assert cli("export", source, "--to", "specforge", whole)[0] == 0
    before = contents(out)
    for folder, options in ((out, []), (out, ["--layers", "0,2"]), (out, ["--layers", "2,0", "--dtype", "float32"])):
        code, _, err = cli("export", source, "--to", "specforge", folder, *options)
        assert (code, "was begun as another export" in err) == (2, True), err
    assert cli("export", source, "--to", "specforge", whole, "--layers", "2,0")[0] == 2
    assert contents(out) == before
    assert cli("export", source, "--to", "specforge", out, "--layers", "2,0", "--dtype", "bfloat16")[0] == 0
    for options, word in (
        (["--layers", "1"], "layer 1"),
        (["--layers", "a"], "--layers"),
        (["--dtype", "int8"], "int8"),
    ):
        code, _, err = cli("export", source, "--to", "specforge", tmp_path / "no", *options)
        assert (code, word in err) == (2, True), err


def test_speculators_layers_follow_the_context_not_the_order_of_capture(tmp_path):
    """The last layer goes last, wherever the cache has it; the others keep their order."""
    write_cache(tmp_path / "cache", [5])
    cache = FeatureCache.open(tmp_path / "cache").view(layers=[3, 0, 2])
    export(cache, LAYOUTS["speculators"], tmp_path / "out")
    stored = load_file(tmp_path / "out" / "hidden_states" / "hs_0.safetensors")["hidden_states"]
    assert torch.equal(stored, cache[0].hidden_states[0].reshape(5, 3, 16)[:, [1, 2, 0]])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_deepspec_files(source, exported, tmp_path, dtype):
    """Read by the protocol's description alone: 56-byte records, then bytes at offsets."""
    cache, out = FeatureCache.open(source), exported["deepspec"]
    if dtype == "float32":  # rounded to the only dtype of the layout
        cache, out = _as_float32(cache), tmp_path / "out"
        export(cache, LAYOUTS["deepspec"], out)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["version"] == 2
    assert manifest["target_layer_ids"] == LAYERS
    assert manifest["hidden_size"] == 64
    assert (manifest["hidden_dtype"], manifest["token_dtype"], manifest["mask_dtype"]) == ("bfloat16", "int32", "uint8")
    assert manifest["target_model_name_or_path"] == cache.manifest.target.name
    assert [s["shard_id"] for s in manifest["shards"]] == list(range(manifest["num_shards"]))
    index = (out / "samples.idx").read_bytes()
    assert manifest["index_record_size"] == struct.calcsize("<QIIQQQQQ") == len(index) / len(cache)
    bins = [(out / shard["file_name"]).read_bytes() for shard in manifest["shards"]]
    for i, sample in enumerate(cache):
        sample_id, shard, length, *offsets = struct.unpack_from("<QIIQQQQQ", index, i * 56)
        assert (sample_id, length) == (i, sample.input_ids.shape[1])

        def stored(which: int, kind: str, width: int, *, at=offsets, data=bins[shard], count=length) -> torch.Tensor:
            return torch.from_numpy(np.frombuffer(data, kind, count * width, at[which]).copy())

        assert torch.equal(stored(0, "<i4", 1), sample.input_ids[0].int())
        assert torch.equal(stored(1, "u1", 1), sample.attention_mask[0].byte())
        assert torch.equal(stored(2, "u1", 1), sample.loss_mask[0].byte())
        states, last = (s[0].bfloat16().view(torch.int16) for s in (sample.hidden_states, sample.last_hidden_states))
        assert torch.equal(stored(3, "<i2", 192).view(length, 192), states)
        assert torch.equal(stored(4, "<i2", 64).view(length, 64), last)
    assert sum(map(len, bins)) == cache.manifest.totals.tokens * (6 + 2 * 256)


def _as_float32(cache: FeatureCache) -> FeatureCache:
    """The same cache as if it had been stored in float32."""

    class Wider(FeatureCache):
        def __getitem__(self, i):
            sample = super().__getitem__(i)
            return replace(
                sample,
                hidden_states=sample.hidden_states.float() * 1.001,
                last_hidden_states=sample.last_hidden_states.float() * 1.001,
            )

    return Wider.open(cache.path)


def test_nemo_dspark_files(source, exported):
    cache, out = FeatureCache.open(source), exported["nemo-dspark"]
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["format_version"], manifest["complete"], manifest["dtype"]) == (1, True, "bf16")
    longest = int(cache.index.num_tokens.max())
    assert (manifest["seq_length"], manifest["target_hidden_dim"], manifest["target_last_hidden_dim"]) == (
        longest,
        192,
        64,
    )
    shards = sorted(out.glob("shard-*.safetensors"))
    assert [p.name for p in shards] == [f"shard-{i:06d}.safetensors" for i in range(len(shards))]
    for i, sample in enumerate(cache):
        with safe_open(shards[i // manifest["shard_size"]], "pt") as shard:
            row = {name: shard.get_slice(name)[i % manifest["shard_size"]] for name in shard.keys()}  # noqa: SIM118
        length = sample.input_ids.shape[1]
        assert row["target_hidden_states"].shape == (longest, 192)
        assert same(row["input_ids"][:length], sample.input_ids[0])
        assert same(row["loss_mask"][:length], sample.loss_mask[0])
        assert same(row["target_hidden_states"][:length], last_normed(sample))
        assert same(row["target_last_hidden_states"][:length], sample.last_hidden_states[0])
        assert not any(tensor[length:].any() for tensor in row.values())
    weights = load_file(out / "target_weights.safetensors")
    assert same(weights["embed_tokens.weight"], cache.get_input_embeddings().weight.bfloat16())
    assert same(weights["lm_head.weight"], cache.get_output_embeddings().weight.bfloat16())


def test_nemo_dspark_shards_are_cut_to_size(source, exported, tmp_path, monkeypatch):
    monkeypatch.setattr("cache_format.export.nemo_dspark.MAX_SHARD_SAMPLES", 7)
    cache = FeatureCache.open(source)
    export(cache, LAYOUTS["nemo-dspark"], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["shard_size"] == 7
    assert len(list((tmp_path / "out").glob("shard-*"))) == -(-len(cache) // 7)


@pytest.mark.parametrize("name", LAYOUTS)
def test_sizes_are_known_before(source, exported, name, tmp_path):
    plan = plan_export(FeatureCache.open(source), LAYOUTS[name], tmp_path / "new")
    found = contents(exported[name])
    del found["export.json"]
    slack = 4096 * plan.files
    assert plan.files == len(found)
    assert abs(plan.bytes - sum(map(len, found.values()))) <= slack
    assert not (tmp_path / "new").exists(), "planning writes nothing"


KILL = """
import os, signal, sys
from pathlib import Path
from cache_format import FeatureCache
from cache_format.export import LAYOUTS, export, interface as layout
source, name, out, after = sys.argv[1:]
def die(*_): os.kill(os.getpid(), signal.SIGKILL)
if after == "first byte":
    count = 0
    def write_all(file, data, real=layout.write_all):
        global count
        count += 1
        real(file, memoryview(data).cast("B")[:5])
        if count > 6: die()
        real(file, memoryview(data).cast("B")[5:])
    def save(record, file, real=layout.torch.save):
        global count
        count += 1
        if count > 3: file.write(b"half"); file.flush(); die()
        real(record, file)
    layout.write_all, layout.torch.save = write_all, save
export(FeatureCache.open(source), LAYOUTS[name], Path(out),
       progress=lambda files, size: files == 2 and after == "second file" and die())
"""


@pytest.mark.parametrize("after", ["second file", "first byte"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_killed_and_run_again_gives_the_same_files(source, exported, tmp_path, name, after):
    out = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", KILL, source, name, out, after], stderr=subprocess.PIPE)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert json.loads((out / "export.json").read_text())["state"] == "exporting"
    kept = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and not p.name.startswith(".")}
    export(FeatureCache.open(source), LAYOUTS[name], out)
    assert contents(out) == contents(exported[name])
    del kept[out / "export.json"]
    assert {p: p.stat().st_mtime_ns for p in kept} == kept, "finished files are not written again"


def test_the_command(source, exported, cli, tmp_path):
    out = tmp_path / "out"
    code, _, err = cli("export", source, "--to", "specforge", out)
    assert code == 0, err
    assert "40 files" in err
    assert "free" in err
    assert "specforge 0.2.0" in err
    assert "target_layer_ids = [0, 2, 5]" in err
    assert contents(out) == contents(exported["specforge"])
    code, report, _ = cli("export", source, "--to", "specforge", out, "--json")
    assert code == 0
    report = json.loads(report)
    assert (report["files"], report["done_files"], report["plan"]["samples"]) == (0, 40, 40)
    code, help_, _ = cli("export", "--help")
    assert code == 0
    assert all(name in help_ for name in LAYOUTS)


@pytest.mark.parametrize("name", ["modelopt", "deepspec", "nemo-dspark", "speculators", "angelslim"])
def test_what_the_cache_lacks_is_refused_with_the_option_that_captures_it(made, cli, tmp_path, name):
    option = "`--target-layers 4,0,2,5`" if name == "speculators" else "`--capture last_hidden_states`"
    code, _, err = cli("export", made, "--to", name, tmp_path / "out")
    assert (code, option in err) == (2, True), err
    assert not (tmp_path / "out").exists()


def test_deepspec_needs_ascending_layers(source, tmp_path):
    cache = FeatureCache.open(source).view(layers=[2, 0, 5])
    with pytest.raises(InputError, match="--target-layers 0,2,5"):
        plan_export(cache, LAYOUTS["deepspec"], tmp_path / "out")


def test_an_out_that_is_not_this_export_is_refused_and_left_alone(source, made, exported, cli, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    code, _, err = cli("export", source, "--to", "specforge", full)
    assert (code, "not empty" in err) == (2, True)
    assert contents(full) == {"notes.txt": b"mine"}
    before = contents(exported["specforge"])
    code, _, err = cli("export", source, "--to", "deepspec", exported["specforge"])
    assert (code, "layout: cache has 'specforge'" in err) == (2, True)
    code, _, err = cli("export", made, "--to", "specforge", exported["specforge"])
    assert (code, "fingerprint" in err) == (2, True)
    assert contents(exported["specforge"]) == before
    for inside in (source, source / "new", source.parent):
        code, _, err = cli("export", source, "--to", "specforge", inside)
        assert (code, "not inside it" in err) == (2, True)
    assert not (source / "new").exists()


def test_bad_input_is_told(source, cli, tmp_path, monkeypatch):
    code, _, err = cli("export", source, "--to", "eagle", tmp_path / "out")
    assert (code, "'eagle' is not one of" in err) == (2, True)
    code, _, err = cli("export", tmp_path, "--to", "specforge", tmp_path / "out")
    assert (code, "not a feature cache" in err) == (2, True)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    code, _, err = cli("export", source, "--to", "specforge", tmp_path / "out")
    assert (code, "Free some space" in err) == (2, True)
    assert not (tmp_path / "out").exists()


def test_damaged_samples_are_not_exported(source, cli, tmp_path):
    cache = shutil.copytree(source, tmp_path / "cache")
    shard = sorted((cache / "shards").iterdir())[1]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    out = tmp_path / "out"
    code, _, err = cli("export", cache, "--to", "specforge", out)
    assert (code, "does not match its checksum" in err) == (1, True)
    assert "Traceback" not in err
    shutil.copy(source / "shards" / shard.name, shard)
    assert cli("export", cache, "--to", "specforge", out)[0] == 0
    with pytest.raises(CacheError):
        FeatureCache.open(tmp_path)


def test_specforge_leaves_out_what_its_reader_refuses(tmp_path, cli):
    samples = write_cache(tmp_path / "cache", [1, 2, 3, 2, 3, 1, 40])
    good = [i for i, s in enumerate(samples) if (s.loss_mask[:-1] & s.loss_mask[1:]).any()]
    assert 0 < len(good) < len(samples)
    code, _, err = cli("export", tmp_path / "cache", "--to", "specforge", tmp_path / "out")
    assert code == 0
    assert f"left out: {len(samples) - len(good)} samples" in err
    files = sorted((tmp_path / "out").rglob("*.ckpt"))
    assert [int(p.stem.removeprefix("data_")) for p in files] == good
    assert "target_last_hidden_states" not in torch.load(files[0], weights_only=True)


@pytest.mark.parametrize("name", ["specforge", "speculators"])
def test_an_empty_cache_is_exported_as_one(tmp_path, name):
    write_cache(tmp_path / "cache", [])
    report = export(FeatureCache.open(tmp_path / "cache"), LAYOUTS[name], tmp_path / "out")
    assert report.left_out == 0


def test_export_is_light_to_import():
    code = (
        "import sys, cache_format.export; print([m for m in ('transformers', 'datasets', 'typer') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# The projects' own readers, where they are installed.


@pytest.mark.slow
def test_specforge_reads_it(source, exported):
    pytest.importorskip("specforge")
    from specforge.algorithms.common import dflash_family_data as data
    from specforge.runtime.data_plane.feature_store import LocalFeatureStore
    from specforge.runtime.data_plane.offline_reader import OfflineManifestReader

    cache, store = FeatureCache.open(source), LocalFeatureStore()
    for build, normalise, collate in (
        (data.build_offline_reader, data.normalize_offline_sample, data.build_collator()),
        (data.build_dspark_offline_reader, data.normalize_dspark_offline_sample, data.build_dspark_collator()),
    ):
        reader = build("dflash", str(exported["specforge"]), run_id="r", ttt_length=1, max_len=256)
        assert isinstance(reader, OfflineManifestReader)
        refs = reader.read()
        assert len(refs) == len(cache)
        batch = collate([normalise(store.get(ref)[0], 256) for ref in refs[:3]])
        ours = cache.batch([0, 1, 2])
        assert same(batch["input_ids"], ours.input_ids)
        assert same(batch["loss_mask"], ours.loss_mask)
        assert same(batch["hidden_states"], ours.hidden_states)
    assert same(batch["target_last_hidden_states"], ours.last_hidden_states)


@pytest.mark.slow
def test_speculators_reads_it(source, exported):
    pytest.importorskip("speculators")
    from speculators.data_generation.offline import find_corrupt_hidden_state_indices
    from speculators.train.data import ArrowDataset, CollateFn

    cache, out = FeatureCache.open(source), exported["speculators"]
    assert find_corrupt_hidden_state_indices(out / "hidden_states", list(range(len(cache)))) == {}
    dataset = ArrowDataset(max_len=512, datapath=out, on_missing="raise")
    assert dataset.approx_lengths == cache.index.num_tokens.tolist()
    for sample, read in zip(cache, (dataset[i] for i in range(len(dataset))), strict=True):
        assert same(read["input_ids"], sample.input_ids[0])
        assert same(read["loss_mask"], sample.loss_mask[0])
        assert same(read["hidden_states"], sample.hidden_states[0][:, :128])
        assert same(read["verifier_last_hidden_states"], sample.hidden_states[0][:, 128:])
    batch = CollateFn(max_len=512, hidden_size=64, num_target_layers=2)([dataset[0], dataset[1]])
    assert batch["hidden_states"].shape == (1, 512, 128)
    assert batch["error_records"] == 0


@pytest.mark.slow
def test_modelopt_reads_it(source, exported):
    pytest.importorskip("modelopt")
    from modelopt.torch.speculative.eagle.utils import EagleOfflineDataCollator, OfflineSupervisedDataset

    cache = FeatureCache.open(source)
    files = [str(path) for path in sorted(exported["modelopt"].rglob("*.pt"))]
    dataset = OfflineSupervisedDataset(files, answer_only_loss=True)
    assert len(dataset) == len(cache)
    longest = int(cache.index.num_tokens[:3].max())
    batch = EagleOfflineDataCollator(longest)([dataset[i] for i in range(3)])
    ours = cache.batch([0, 1, 2])
    assert same(batch["input_ids"], ours.input_ids)
    assert same(batch["attention_mask"], ours.attention_mask)
    assert same(batch["loss_mask"], ours.loss_mask)
    outputs = batch["base_model_outputs"]
    assert same(outputs["base_model_hidden_states"], ours.last_hidden_states)
    assert same(outputs["aux_hidden_states"][..., :128], ours.hidden_states[..., :128])
    assert outputs["base_hidden_prenorm"] is False


@pytest.mark.slow
def test_nemo_reads_it(source, exported):
    pytest.importorskip("nemo_automodel")
    from nemo_automodel.components.datasets.llm import dspark_cache as nemo
    from nemo_automodel.components.datasets.llm.offline_cache import ensure_supervision_options_match

    cache, out = FeatureCache.open(source), str(exported["nemo-dspark"])
    manifest = nemo.read_manifest(out)
    expected = {"mask_reasoning_content": False, "mask_generation_prompt": True}
    ensure_supervision_options_match(manifest, expected, cache_name="DSpark", cache_dir=out, producer_name="export")
    loader = nemo.build_cached_dspark_dataloader(cache_dir=out, batch_size=4, shuffle=False)
    assert len(loader.dataset) == len(cache)
    for start, batch in zip(range(0, len(cache), 4), loader, strict=True):
        ours = cache.batch(range(start, min(start + 4, len(cache))))
        length = ours.input_ids.shape[1]
        assert same(batch["input_ids"][:, :length], ours.input_ids)
        assert same(batch["loss_mask"][:, :length], ours.loss_mask)
        assert same(batch["target_hidden_states"][:, :length, :128], ours.hidden_states[..., :128])
        assert same(batch["target_last_hidden_states"][:, :length], ours.last_hidden_states)
    embed, head = nemo.read_target_weight_modules(out)
    assert same(embed.weight, cache.get_input_embeddings().weight.bfloat16())
    assert same(head.weight, cache.get_output_embeddings().weight.bfloat16())
