"""extract from end to end: offline equals online, a rerun resumes or is refused, and the user is told."""

from __future__ import annotations

import json
import resource
import shutil
from dataclasses import replace
from multiprocessing.util import Finalize
from pathlib import Path

import commands
import numpy as np
import pytest
import torch
from jobs import LAYER_IDS, contents, on
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cache_format import FeatureCache
from cache_format.layout.manifest import LATER_IDENTITY, Manifest
from cache_format.layout.samples import PreparedSamples
from cache_format.upkeep.verify import verify
from extractor.config import PlanOptions
from extractor.job.plan import Plan
from extractor.target.hooks import HFDFlashTargetModel


@pytest.fixture(scope="session")
def online(tiny_target) -> HFDFlashTargetModel:
    return HFDFlashTargetModel(AutoModelForCausalLM.from_pretrained(tiny_target, dtype=torch.float32), LAYER_IDS)


def test_offline_equals_online(made, online):
    cache = FeatureCache.open(made)
    order = np.random.default_rng(0).permutation(len(cache))
    for start in range(0, len(cache), 6):
        offline = cache.batch(order[start : start + 6])
        live = online.generate_batch(offline.input_ids, offline.attention_mask, offline.loss_mask)
        real = offline.attention_mask.bool()
        scale = live.hidden_states[real].abs().max()
        assert (offline.hidden_states[real] - live.hidden_states[real]).abs().max() <= 1e-5 * scale
        assert not offline.hidden_states[~real].any()
        assert offline.hidden_states.dtype == live.hidden_states.dtype
        assert offline.hidden_states.shape == live.hidden_states.shape


def test_tokens_and_masks_are_those_of_the_chat_template(made, demo_jsonl, tiny_target):
    cache, tokenizer = FeatureCache.open(made), AutoTokenizer.from_pretrained(tiny_target)
    rows = [json.loads(line) for line in demo_jsonl.read_text().splitlines()]
    samples = PreparedSamples(made / "samples", 1)
    for i in range(len(cache)):
        messages = rows[samples.source_rows[i]]["messages"]
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"][:256]
        sample = cache[i]
        assert sample.input_ids[0].tolist() == ids
        learned = tokenizer.decode(sample.input_ids[0][sample.loss_mask[0].bool()])
        said = "".join(m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant")
        assert said.startswith(learned) if len(ids) == 256 else said == learned


def test_the_same_batch_composition_gives_the_same_bits(made, online):
    cache, manifest = FeatureCache.open(made), Manifest.read(made)
    samples = PreparedSamples(made / "samples", 1)
    plan = Plan(samples.num_tokens, manifest.schema().token_bytes, PlanOptions(shard_bytes=2 << 20, batch_tokens=2048))
    position = {int(sample_id): i for i, sample_id in enumerate(cache.index.sample_id)}
    for shard in plan:
        for batch in shard.batches:
            offline = cache.batch([position[i] for i in shard.sample_ids[batch].tolist()])
            with torch.inference_mode():
                live = online.generate_batch(offline.input_ids, None, offline.loss_mask)
            real = offline.attention_mask.bool()
            assert torch.equal(offline.hidden_states[real], live.hidden_states[real])


def test_embeddings_are_the_targets(made, online):
    cache = FeatureCache.open(made)
    assert torch.equal(cache.get_input_embeddings().weight, online.get_input_embeddings().weight)
    assert torch.equal(cache.get_output_embeddings().weight, online.model.lm_head.weight)
    stored = load_file(made / "target" / "embeddings.safetensors")
    assert set(stored) == {"embed_tokens.weight", "norm.weight"}, "tied weights are stored once"
    assert AutoTokenizer.from_pretrained(made / "target").chat_template


def test_the_shards_are_little_larger_than_what_they_hold(tiny_target, demo_jsonl, tmp_path, cli):
    """At a realistic shard size: 1.002 times real tokens x (L x H x itemsize + 6)."""
    out = tmp_path / "c"
    code, _, _ = cli("extract", "--target", tiny_target, "--data", demo_jsonl, "--target-layers", "1,2,3", "--out", out)
    assert code == 0
    manifest = Manifest.read(out)
    stored = sum(path.stat().st_size for path in (out / "shards").iterdir())
    assert stored <= 1.002 * manifest.totals.tokens * (manifest.width * 4 + 6)


def test_a_finished_cache_is_left_alone(made, job, cli):
    before = contents(made)
    code, _, err = cli("extract", *job, "--out", made)
    assert (code, "nothing to do" in err) == (0, True)
    assert contents(made) == before


@pytest.mark.parametrize("lost", ["some_shards", "tables", "all_shards", "everything_but_samples"])
def test_a_resumed_run_gives_the_same_bytes(made, job, cli, tmp_path, lost):
    cache = shutil.copytree(made, tmp_path / "cache")
    manifest = Manifest.read(cache)
    shards = sorted((cache / "shards").iterdir())
    (cache / "index.arrow").unlink()
    (cache / "shards.arrow").unlink()
    for path in {"some_shards": shards[2:5], "tables": []}.get(lost, shards):
        path.unlink()
    if lost == "everything_but_samples":
        shutil.rmtree(cache / "target")
        begun = {k: v for k, v in manifest.identity.items() if k not in LATER_IDENTITY}
        unfinished = {"state": "preparing", "identity": begun, "fingerprint": "", "data": None, "totals": None}
    else:
        unfinished = {"state": "extracting"}
    files = {name: info for name, info in manifest.files.items() if name not in ("index.arrow", "shards.arrow")}
    replace(manifest, **unfinished, files=files if lost != "everything_but_samples" else {}).write(cache)
    (cache / "shards" / ".shard-00000.safetensors.0000.tmp").write_bytes(b"half")
    code, _, err = cli("extract", *job, "--out", cache)
    assert code == 0, err
    assert contents(cache) == contents(made)


@pytest.mark.parametrize(
    ("option", "value", "field"),
    [
        ("--max-length", "255", "max_length"),
        ("--target-layers", "0,2,4", "target_layer_ids"),
        ("--dtype", "bfloat16", "dtype"),
        ("--limit", "119", "limit"),
        ("--batch-tokens", "1024", "batch_tokens"),
        ("--shard-size", "1MiB", "shard_bytes"),
        ("--min-loss-tokens", "2", "min_loss_tokens"),
        ("--loss-on", "all", "loss_on"),
    ],
)
def test_a_run_with_other_options_is_refused_and_touches_nothing(made, job, cli, option, value, field):
    before = contents(made)
    code, _, err = cli("extract", *job, option, value, "--out", made)
    assert code == 2
    assert f"  {field}: cache has" in err
    assert "Traceback" not in err
    assert contents(made) == before


def test_other_rows_or_another_order_are_refused(made, job, demo_jsonl, tmp_path, cli):
    lines = demo_jsonl.read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join([lines[1], lines[0], *lines[2:]]))
    code, _, err = cli("extract", *on(job, tmp_path / "train.jsonl"), "--out", made)
    assert (code, "  data.digest: cache has" in err) == (2, True)


def test_other_weights_or_another_template_are_refused(made, job, tiny_target, tmp_path, cli):
    other = shutil.copytree(tiny_target, tmp_path / "weights")
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] += 1e-3
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    code, _, err = cli("extract", *job, "--target", other, "--out", made)
    assert (code, "  target.weights: cache has" in err) == (2, True)

    other = shutil.copytree(tiny_target, tmp_path / "template")
    template = other / "chat_template.jinja"
    template.write_text(template.read_text().replace("user", "user ") + " ")
    code, _, err = cli("extract", *job, "--target", other, "--out", made)
    assert (code, "  chat_template: cache has" in err) == (2, True)


def test_the_same_target_in_another_folder_is_the_same_target(made, job, tiny_target, tmp_path, cli):
    moved = shutil.copytree(tiny_target, tmp_path / "moved")
    code, _, err = cli("extract", *job, "--target", moved, "--out", made)
    assert (code, "nothing to do" in err) == (0, True)


def broken_target(tiny_target: Path, folder: Path) -> Path:
    """A copy that gives Inf wherever a ``~`` comes in."""
    folder = shutil.copytree(tiny_target, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][tokenizer("~", add_special_tokens=False)["input_ids"][0], 0] = float("inf")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("codec", ["raw", "fp8", "zbits"])
def test_non_finite_states_stop_the_job_or_are_quarantined(job, tiny_target, tmp_path, cli, codec):
    question = {"role": "user", "content": "hi"}
    rows = [{"messages": [question, {"role": "assistant", "content": f"{c} ok"}]} for c in "ab~c~"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = [*on(job, tmp_path / "rows.jsonl"), "--target", broken_target(tiny_target, tmp_path / "t")]
    job += ["--codec", codec]
    code, _, err = cli("extract", *job, "--out", tmp_path / "a")
    assert code == 1
    assert "sample 2 (dataset row 2" in err or "sample 4 (dataset row 4" in err
    assert "layer 4" in err
    assert not list((tmp_path / "a" / "shards").iterdir())
    code, _, err = cli("extract", *job, "--on-nonfinite", "quarantine", "--out", tmp_path / "b")
    assert (code, "quarantined: 2" in err) == (0, True)
    cache = FeatureCache.open(tmp_path / "b")
    assert cache.manifest.quarantined == [2, 4]
    assert all(torch.isfinite(cache[i].hidden_states).all() for i in range(len(cache)))
    assert verify(tmp_path / "b").whole
    assert "2, 4" in cli("inspect", tmp_path / "b")[1]
    assert cli("extract", *job, "--on-nonfinite", "quarantine", "--out", tmp_path / "b")[0] == 0


def test_bad_input_is_told_before_anything_is_written(job, tmp_path, cli):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    out = tmp_path / "out"
    for arguments, named in [
        (["--target", tmp_path / "nowhere", "--out", out], "nowhere"),
        (["--data", tmp_path / "nowhere.jsonl", "--out", out], "nowhere.jsonl"),
        (["--data", tmp_path / "empty.jsonl", "--out", out], "empty.jsonl"),
        (["--target-layers", "0,6", "--out", out], "--target-layers"),
        (["--target-layers", "0,0", "--out", out], "twice"),
        (["--shard-size", "big", "--out", out], "512MiB"),
        (["--dtype", "int8", "--out", out], "--dtype"),
        (["--device", "tpu9", "--out", out], "--device"),
        (["--device", "cuda:99", "--out", out], "cuda:99"),
        (["--too-long", "split", "--out", out], "--too-long"),
        (["--out", tmp_path / "file"], "is a file"),
        (["--out", tmp_path / "full"], "thesis.tex"),
    ]:
        code, _, err = cli("extract", *job, *arguments)
        assert code == 2, (arguments, err)
        assert named in err, (arguments, err)
        assert "Traceback" not in err
        assert not out.exists()


def test_a_bad_row_is_named_and_the_folder_can_be_used_again(job, tmp_path, cli, demo_jsonl):
    lines = demo_jsonl.read_text().splitlines(keepends=True)[:50]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join([*lines[:16], "{broken\n", *lines[16:]]))
    code, _, err = cli("extract", *on(job, data), "--out", tmp_path / "out")
    assert (code, "rows.jsonl" in err, "17" in err) == (2, True, True)
    data.write_text("".join(lines))
    assert cli("extract", *on(job, data), "--out", tmp_path / "out")[0] == 0
    assert len(FeatureCache.open(tmp_path / "out")) == 50


def test_a_full_disk_is_told_before_anything_is_computed(job, tmp_path, cli, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr("extractor.job.out_folder.shutil.disk_usage", lambda path: usage)
    code, _, err = cli("extract", *job, "--out", tmp_path / "out")
    assert (code, "9.8 KiB free" in err) == (2, True)
    monkeypatch.undo()


def test_inspect_verify_and_estimate(made, job, cli):
    code, out, _ = cli("inspect", made)
    assert (code, "complete" in out, "4, 0, 2" in out) == (0, True, True)
    summary = json.loads(cli("inspect", made, "--json")[1])
    assert summary["totals"]["samples"] == 120
    code, out, _ = cli("verify", made)
    assert (code, "whole" in out) == (0, True)
    assert json.loads(cli("verify", made, "--quick", "--json")[1])["whole"] is True
    estimated = json.loads(cli("estimate", *job, "--json")[1])
    shards = sorted((made / "shards").iterdir())
    assert estimated["shard_bytes"] == sum(path.stat().st_size for path in shards)
    assert estimated["shards"] == len(shards)
    assert estimated["tokens"] == summary["totals"]["tokens"]
    assert "WARNING" not in cli("estimate", *job)[1]


def test_verify_exit_codes(made, cli, tmp_path):
    cache = shutil.copytree(made, tmp_path / "cache")
    shard = next((cache / "shards").iterdir())
    shard.write_bytes(shard.read_bytes()[:-1])
    code, out, _ = cli("verify", cache)
    assert (code, shard.name in out) == (1, True)
    assert cli("verify", tmp_path)[0] == 2
    assert cli("inspect", tmp_path)[0] == 2
    assert cli("verify", tmp_path / "nowhere")[0] == 2


def test_reports_as_json(job, tmp_path, cli):
    report = json.loads(cli("extract", *job, "--out", tmp_path / "c", "--json")[1])
    assert report["samples"] == 120
    assert report["run"]["tokens"] == report["tokens"] > 0
    assert report["run"]["shards"] == report["shards"]


def say_peak_memory() -> None:
    """As the command ends; in KiB."""
    Finalize(None, lambda: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, flush=True), exitpriority=0)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_dataset(tiny_target, demo_jsonl, tmp_path):
    """Peak resident memory of the whole command at 1x and 10x the rows."""
    lines = demo_jsonl.read_text().splitlines(keepends=True)
    (tmp_path / "big.jsonl").write_text("".join(lines * 7))
    peaks = []
    for limit in (200, 2000):
        arguments = [
            *("extract", "--target", tiny_target, "--data", tmp_path / "big.jsonl", "--target-layers", "1,2,3"),
            *("--limit", limit, "--shard-size", "8MiB", "--out", tmp_path / str(limit), "--device", "cpu"),
        ]
        process = commands.start(*arguments, before=say_peak_memory)
        out, errors = process.communicate()
        assert process.returncode == 0, errors
        peaks.append(int(out.split()[-1]) / 1024)
        assert (tmp_path / str(limit) / "index.arrow").exists()
    print(f"peak MiB at 200 and 2,000 rows: {peaks}")
    assert peaks[1] < peaks[0] + 100


def test_captures_come_out_of_the_reader(job, tmp_path, cli, online):
    captures = ["--capture", "last_hidden_states", "--capture", "logits-topk=5"]
    estimated = json.loads(cli("estimate", *job, *captures, "--json")[1])
    code, _, err = cli("extract", *job, *captures, "--out", tmp_path / "c")
    assert code == 0, err
    assert estimated["shard_bytes"] == sum(path.stat().st_size for path in (tmp_path / "c" / "shards").iterdir())
    assert estimated["capture_bytes"] == 64 * 4 + 5 * 8 + 4
    assert verify(tmp_path / "c").whole
    cache = FeatureCache.open(tmp_path / "c")
    batch = cache.batch([3, 9])
    with torch.no_grad():
        live = online.model(input_ids=batch.input_ids, output_hidden_states=True)
    real = batch.attention_mask.bool()
    torch.testing.assert_close(batch.last_hidden_states[real], live.hidden_states[-1][real], rtol=1e-4, atol=1e-4)
    assert batch.logits_topk_ids.dtype == torch.int64
    picked = live.logits.gather(2, batch.logits_topk_ids)
    torch.testing.assert_close(batch.logits_topk_values[real], picked[real], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(batch.logits_logsumexp[real], live.logits.logsumexp(-1)[real], rtol=1e-4, atol=1e-4)
    assert not batch.logits_topk_values[~real].any()
    code, _, err = cli("extract", *job, "--out", tmp_path / "c")
    assert (code, "  capture: cache has" in err) == (2, True)
    assert cli("extract", *job, "--capture", "everything", "--out", tmp_path / "d")[0] == 2
