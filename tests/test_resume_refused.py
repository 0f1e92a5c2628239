"""A cache is resumed with the inputs it was begun with, or not at all: what differs is named, nothing is touched."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import contents, on
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from cache_format.layout.manifest import LATER_IDENTITY, Manifest, fingerprint
from cache_format.layout.samples import PartInfo, Sample, part_path, write_part


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """So small a target is run sooner by one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def small_job(tiny_target, demo_jsonl, tmp_path_factory) -> list[str]:
    rows = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows.write_text("".join(demo_jsonl.read_text().splitlines(keepends=True)[:40]))
    return [
        *("extract", "--target", str(tiny_target), "--data", str(rows), "--device", "cpu", "--limit", "30"),
        *("--target-layers", "4,0,2", "--max-length", "64", "--shard-size", "192KiB", "--batch-tokens", "512"),
    ]


@pytest.fixture(scope="module")
def whole(small_job, tmp_path_factory) -> Path:
    """That job's cache."""
    from extractor.cli.app import app

    out = tmp_path_factory.mktemp("whole") / "c"
    app([*small_job, "--out", str(out)], standalone_mode=False)
    return out


def unfinished(whole: Path, out: Path, state: str) -> Path:
    """A copy that was left in ``state``, with some shards where they may be there."""
    shutil.copytree(whole, out)
    manifest = Manifest.read(out)
    if state == "complete":
        return out
    for name in ("index.arrow", "shards.arrow", "shards/shard-00001.safetensors", "shards/shard-00002.safetensors"):
        (out / name).unlink()
    if state == "extracting":
        files = {name: info for name, info in manifest.files.items() if name not in ("index.arrow", "shards.arrow")}
        replace(manifest, state=state, files=files).write(out)
        return out
    for folder in ("shards", "target"):
        shutil.rmtree(out / folder)
    identity = {name: value for name, value in manifest.identity.items() if name not in LATER_IDENTITY}
    nothing: dict[str, Any] = {"fingerprint": "", "data": None, "totals": None, "files": {}}
    replace(manifest, state=state, identity=identity, **nothing).write(out)
    return out


@pytest.fixture
def begun(whole, tmp_path) -> Path:
    """A cache that lacks some of its shards."""
    return unfinished(whole, tmp_path / "begun", "extracting")


def look(cache: Path) -> dict[str, tuple[bytes, int]]:
    """Every file, its bytes and when it was written; folders too."""
    paths = sorted(cache.rglob("*"))
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) if p.is_file() else (b"", 0) for p in paths}


@dataclass(frozen=True)
class Case:
    """One thing that is different at the second run."""

    field: str
    """the identity field that has to be named, alone"""
    options: tuple[str, ...] = ()
    rows: Callable[[list[str]], list[str]] | None = None
    """lines of the dataset -> other lines"""
    rows_name: str = "rows.jsonl"
    target: Callable[[Path], None] | None = None
    """changes a copy of the target"""
    stored: Any = None
    """what the cache was begun with, where no option of today says so: another value of the field"""


def one_weight_changed(target: Path) -> None:
    path = target / "model.safetensors"
    weights, size = load_file(path), path.stat().st_size
    weights["model.layers.3.mlp.up_proj.weight"][5, 7] += 2**-10
    save_file(weights, path, metadata={"format": "pt"})
    assert path.stat().st_size == size


def config_changed(target: Path) -> None:
    config = json.loads((target / "config.json").read_text())
    config["rms_norm_eps"] *= 2
    (target / "config.json").write_text(json.dumps(config))


def one_token_more(target: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert tokenizer.add_tokens(["<one more>"]) == 1
    tokenizer.save_pretrained(target)


def special_tokens_split(target: Path) -> None:
    config = json.loads((target / "tokenizer_config.json").read_text())
    (target / "tokenizer_config.json").write_text(json.dumps({**config, "split_special_tokens": True}))


def template_with_one_space_more(target: Path) -> None:
    path = target / "chat_template.jinja"
    path.write_text(path.read_text().replace("'\\n' + message['content']", "'\\n ' + message['content']"))


def one_character_changed(lines: list[str]) -> list[str]:
    at = lines[7].index('"content": "') + len('"content": "')
    changed = lines[7][:at] + chr(ord(lines[7][at]) ^ 1) + lines[7][at + 1 :]
    assert json.loads(changed) != json.loads(lines[7])
    return [*lines[:7], changed, *lines[8:]]


CASES = {
    "rows in another order": Case("data.digest", rows=lambda lines: [lines[1], lines[0], *lines[2:]]),
    "one row more": Case("data.digest", rows=lambda lines: [*lines, lines[0]]),
    "one row fewer": Case("data.digest", rows=lambda lines: lines[:-1]),
    "one character of a row": Case("data.digest", rows=one_character_changed),
    "another file name": Case("data.digest", rows=lambda lines: lines, rows_name="other.jsonl"),
    "weights": Case("target.weights", target=one_weight_changed),
    "model config": Case("target.config", target=config_changed),
    "tokenizer": Case("tokenizer", target=one_token_more),
    "chat template": Case("chat_template", target=template_with_one_space_more),
    "order of layers": Case("target_layer_ids", ("--target-layers", "0,2,4")),
    "fewer layers": Case("target_layer_ids", ("--target-layers", "4,0")),
    "other layers": Case("target_layer_ids", ("--target-layers", "4,0,3")),
    "dtype": Case("dtype", ("--dtype", "bfloat16")),
    "attention": Case("attn_implementation", ("--attn-implementation", "eager")),
    "compile": Case("compile", ("--compile",)),
    "deterministic": Case("deterministic", ("--deterministic",)),
    "last hidden states": Case("capture", ("--capture", "last_hidden_states")),
    "top-k logits": Case("capture", ("--capture", "logits-topk=4")),
    "max length": Case("max_length", ("--max-length", "63")),
    "too long": Case("too_long", ("--too-long", "drop")),
    "min loss tokens": Case("min_loss_tokens", ("--min-loss-tokens", "2")),
    "loss on all": Case("loss_on", ("--loss-on", "all")),
    "loss on said": Case("loss_on", ("--loss-on", "assistant")),
    "row format": Case("row_format", ("--row-format", "messages")),
    "bad rows": Case("on_bad_row", ("--on-bad-row", "skip")),
    "limit": Case("limit", ("--limit", "29")),
    "non-finite": Case("on_nonfinite", ("--on-nonfinite", "quarantine")),
    "shard size": Case("shard_bytes", ("--shard-size", "256KiB")),
    "batch tokens": Case("batch_tokens", ("--batch-tokens", "513")),
    "another codec": Case("codec", stored={"name": "raw", "level": 2}),
    "another plan": Case("plan", stored=0),
    "padding found otherwise": Case("padding", stored="another"),
    "a checkpoint dequantised": Case("parameters", stored="bfloat16 9"),
    "another way to run quantised weights": Case("quantization", stored="another"),
    "another kernel for experts": Case("experts_implementation", stored="another"),
    "how a tokenizer splits": Case("tokenizer", target=special_tokens_split),
    "a field of a later version": Case("rope_override", stored="yarn"),
}


def test_every_field_of_the_identity_has_a_case(whole):
    """A new field fails here until there is a case of it. ``samples`` has a test of its own."""
    assert set(Manifest.read(whole).identity) | {"rope_override", "quantization"} == {
        case.field for case in CASES.values()
    } | {"samples"}


@pytest.fixture
def changed(cli, small_job, tiny_target, tmp_path) -> Callable[[Case, Path], tuple[int, str]]:
    """Run the job with what a case changes: exit code and messages."""

    def run(case: Case, out: Path) -> tuple[int, str]:
        job, options = small_job, [*case.options]
        if case.rows is not None:
            lines = Path(small_job[small_job.index("--data") + 1]).read_text().splitlines(keepends=True)
            (tmp_path / case.rows_name).write_text("".join(case.rows(lines)))
            job = on(small_job, tmp_path / case.rows_name)
        if case.target is not None:
            case.target(shutil.copytree(tiny_target, tmp_path / "target"))
            options += ["--target", str(tmp_path / "target")]
        code, _, err = cli(*job, *options, "--out", out)
        return code, err

    return run


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_resume_with_one_thing_changed_is_refused(begun, changed, case):
    if case.stored is not None:
        manifest = Manifest.read(begun)
        assert manifest.identity.get(case.field) != case.stored
        identity = {**manifest.identity, case.field: case.stored}
        replace(manifest, identity=identity, fingerprint=fingerprint(identity)).write(begun)
    before = look(begun)
    code, err = changed(case, begun)
    assert code == 2, err
    assert re.findall(r"^  (\S+): cache has .*, asked for .*$", err, re.M) == [case.field], err
    assert "nothing was touched" in err
    assert "Run with the original options to resume it, or choose another --out" in err
    assert "Traceback" not in err
    assert look(begun) == before


@pytest.mark.parametrize("state", ["preparing", "complete"])
@pytest.mark.parametrize("name", ["rows in another order", "max length", "weights", "chat template", "order of layers"])
def test_the_state_of_the_cache_makes_no_difference(whole, changed, tmp_path, state, name):
    out = unfinished(whole, tmp_path / "c", state)
    before = look(out)
    code, err = changed(CASES[name], out)
    assert (code, f"  {CASES[name].field}: cache has" in err) == (2, True), err
    assert look(out) == before


def test_several_changes_are_all_named(begun, cli, small_job):
    code, _, err = cli(*small_job, "--max-length", "32", "--limit", "10", "--dtype", "float16", "--out", begun)
    assert code == 2
    assert set(re.findall(r"^  (\S+): cache has", err, re.M)) == {"max_length", "limit", "dtype"}


def test_other_prepared_samples_under_the_same_inputs_are_told(begun, cli, small_job):
    """The one field without a second input to compare: samples/ itself is digested and has to be what it was."""
    part = part_path(begun / "samples", 0)
    tokens = torch.arange(9, dtype=torch.int32).numpy()
    write_part(part, [Sample(tokens, (tokens * 0 + 1).astype("u1"), 0)], PartInfo(0, 30, {}))
    before = look(begun)
    code, _, err = cli(*small_job, "--out", begun)
    assert code == 1
    assert f"{begun / 'samples'}: is not what the manifest says" in err
    assert look(begun) == before


@pytest.mark.parametrize("name", ["rows in another order", "one character of a row", "tokenizer", "chat template"])
def test_without_a_manifest_another_job_takes_over_no_prepared_samples(whole, changed, small_job, tmp_path, name):
    """A damaged manifest was set aside, or a job was killed before it wrote one; the samples of either are there."""
    out, apart = tmp_path / "c", tmp_path / "apart"
    (out / "samples").mkdir(parents=True)
    shutil.copy(whole / "samples" / "samples-00000.arrow", out / "samples")
    assert changed(CASES[name], out)[0] == 0
    shutil.rmtree(tmp_path / "target", ignore_errors=True)
    assert changed(CASES[name], apart)[0] == 0
    assert contents(out) == contents(apart)


@pytest.mark.parametrize(("option", "value"), [("--max-length", "50"), ("--loss-on", "all"), ("--limit", "20")])
def test_without_a_manifest_other_options_take_over_no_prepared_samples(whole, cli, small_job, tmp_path, option, value):
    out, apart = tmp_path / "c", tmp_path / "apart"
    (out / "samples").mkdir(parents=True)
    shutil.copy(whole / "samples" / "samples-00000.arrow", out / "samples")
    for folder in (out, apart):
        assert cli(*small_job, option, value, "--out", folder)[0] == 0
    assert contents(out) == contents(apart)


def same_rows(tmp_path: Path, small_job: list[str], tiny_target: Path) -> list[str]:
    (tmp_path / "moved").mkdir()
    return on(small_job, shutil.copy(small_job[small_job.index("--data") + 1], tmp_path / "moved"))


def same_target(tmp_path: Path, small_job: list[str], tiny_target: Path) -> list[str]:
    return [*small_job, "--target", str(shutil.copytree(tiny_target, tmp_path / "another_name"))]


@pytest.mark.parametrize(
    "options",
    [
        same_rows,
        same_target,
        ["--attn-implementation", "sdpa"],
        ["--dtype", "float32"],
        ["--batch-tokens", "auto"],
        ["--num-draft-layers", "2"],
        ["--streaming"],
    ],
    ids=lambda options: options.__name__ if callable(options) else " ".join(options),
)
def test_what_changes_no_byte_resumes(begun, whole, cli, small_job, tiny_target, tmp_path, options):
    """The same rows or target in another folder, a default that is spelt out, how rows are read."""
    job = options(tmp_path, small_job, tiny_target) if callable(options) else [*small_job, *options]
    code, _, err = cli(*job, "--out", begun)
    assert code == 0, err
    assert contents(begun) == contents(whole)
