"""What decides a byte is in the identity: code, adapters, weights wherever they lie, and what changes meanwhile."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from jobs import contents, on
from safetensors.torch import load_file, save_file

import extractor.job.job
import extractor.job.run_shards
from cache_format import FeatureCache
from cache_format.errors import InputError
from cache_format.layout.manifest import Manifest
from extractor.target.adapter import with_adapter
from extractor.target.load_target import load_config, load_target, load_tokenizer
from extractor.target.target_identity import identify_target, tokenizer_identity


@pytest.fixture
def target(tiny_target, tmp_path) -> Path:
    return shutil.copytree(tiny_target, tmp_path / "target")


@pytest.fixture
def job(target, small_job) -> list[str]:
    return [*small_job, "--target", str(target)]


def identity(folder: Path, **options) -> dict[str, str]:
    config = load_config(str(folder), None, options.get("trust_remote_code", False))
    return identify_target(str(folder), None, config, **options).fields


def sharded(target: Path, below: str) -> Path:
    """The weights in two files in a sub-folder, named by an index."""
    weights = load_file(target / "model.safetensors")
    (target / "model.safetensors").unlink()
    (target / below).mkdir()
    names = sorted(weights)
    weight_map = {}
    for number, part in enumerate((names[:20], names[20:])):
        file = f"{below}/part-{number}.safetensors"
        save_file({name: weights[name] for name in part}, target / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    return target / below / "part-1.safetensors"


def add_one(path: Path) -> None:
    """In place, size and time of the file as before."""
    times = path.stat()
    weights = load_file(path)
    name = max(weights)
    weights[name] = weights[name] + 1
    data = save_to_bytes(weights)
    assert len(data) == path.stat().st_size
    with open(path, "r+b") as file:
        file.write(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def save_to_bytes(weights: dict[str, torch.Tensor]) -> bytes:
    from safetensors.torch import save

    return save(weights, metadata={"format": "pt"})


# -- files ------------------------------------------------------------------------------------------------------------


def test_weights_in_a_sub_folder_are_digested(target):
    part = sharded(target, "parts")
    before = identity(target)
    add_one(part)
    assert identity(target)["weights"] != before["weights"]
    load_target(
        str(target),
        revision=None,
        dtype=torch.float32,
        device=torch.device("cpu"),
        attn_implementation=None,
        trust_remote_code=False,
    )
    part.unlink()
    with pytest.raises(InputError, match=r"parts/part-1.safetensors"):
        identity(target)


def test_an_index_that_is_none_is_told(target):
    sharded(target, "parts")
    (target / "model.safetensors.index.json").write_text("[1]")
    with pytest.raises(InputError, match=r"model.safetensors.index.json cannot be read"):
        identity(target)


CODE = """
from transformers import Qwen3Config, Qwen3ForCausalLM
from .helper import FACTOR
class MyConfig(Qwen3Config):
    model_type = "mine"
class MyModel(Qwen3ForCausalLM):
    config_class = MyConfig
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)
"""


def with_code(target: Path) -> Path:
    config = json.loads((target / "config.json").read_text())
    config |= {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.MyModel"},
    }
    (target / "config.json").write_text(json.dumps(config))
    (target / "mine.py").write_text(CODE)
    (target / "helper.py").write_text("FACTOR = 1\n")
    return target


@pytest.mark.parametrize("file", ["mine.py", "helper.py"])
def test_code_that_comes_with_the_target_is_digested(target, job, cli, tmp_path, file):
    with_code(target)
    out, tokens = tmp_path / "c", ("--max-length", "16", "--limit", "2", "--trust-remote-code")
    code, _, err = cli(*job, *tokens, "--out", out)
    assert code == 0, err
    assert Manifest.read(out).identity["target.code"]
    (out / "shards" / "shard-00000.safetensors").unlink()
    before = contents(out)
    (target / file).write_text((target / file).read_text() + "# changed\n")
    code, _, err = cli(*job, *tokens, "--out", out)
    assert (code, "  target.code: cache has" in err) == (2, True), err
    assert contents(out) == before


def test_code_in_another_folder_is_digested(target, tmp_path):
    elsewhere = tmp_path / "code"
    elsewhere.mkdir()
    with_code(target)
    for name in ("mine.py", "helper.py"):
        (target / name).rename(elsewhere / name)
    config = json.loads((target / "config.json").read_text())
    config["auto_map"] = {name: f"{elsewhere}--{where}" for name, where in config["auto_map"].items()}
    (target / "config.json").write_text(json.dumps(config))
    before = identity(target, trust_remote_code=True)
    (elsewhere / "helper.py").write_text("FACTOR = 2\n")
    assert identity(target, trust_remote_code=True)["code"] != before["code"]


@pytest.mark.parametrize(
    "setting",
    [{"split_special_tokens": True}, {"add_prefix_space": True}, {"clean_up_tokenization_spaces": True}],
    ids=lambda setting: next(iter(setting)),
)
def test_settings_of_the_tokenizer_are_digested(target, setting):
    before = tokenizer_identity(load_tokenizer(str(target), None, False))
    config = json.loads((target / "tokenizer_config.json").read_text())
    assert config.get(next(iter(setting))) != next(iter(setting.values()))
    (target / "tokenizer_config.json").write_text(json.dumps({**config, **setting}))
    after = tokenizer_identity(load_tokenizer(str(target), None, False))
    assert after["tokenizer"] != before["tokenizer"]
    assert after["chat_template"] == before["chat_template"]


# -- adapters ---------------------------------------------------------------------------------------------------------


def adapter(target: Path, folder: Path, seed: int = 0) -> Path:
    """A LoRA adapter that does something."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(target)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(folder)
    return folder


def test_an_adapter_beside_the_weights_is_refused(target, job, cli, tmp_path):
    adapter(target, target)
    code, _, err = cli(*job, "--out", tmp_path / "c")
    assert (code, "--adapter FOLDER" in err) == (2, True), err
    assert not (tmp_path / "c").exists()


def test_an_adapter_is_used_where_it_is_asked_for(target, job, cli, tmp_path):
    folder = adapter(target, tmp_path / "adapter")
    out, plain = tmp_path / "c", tmp_path / "plain"
    code, _, err = cli(*job, "--adapter", folder, "--out", out)
    assert code == 0, err
    assert cli(*job, "--out", plain)[0] == 0
    assert Manifest.read(out).identity["target.adapter"]
    with_it, without = (FeatureCache.open(path)[0].hidden_states for path in (out, plain))
    assert not torch.allclose(with_it, without, atol=1e-2)
    model = load_target(
        str(target),
        revision=None,
        dtype=torch.float32,
        device=torch.device("cpu"),
        attn_implementation=None,
        trust_remote_code=False,
    )
    states = with_adapter(model, folder)(
        input_ids=FeatureCache.open(out)[0].input_ids, output_hidden_states=True
    ).hidden_states
    assert torch.allclose(with_it, torch.cat([states[1], states[4]], -1), atol=1e-5)
    # Resumed, checked: with this adapter and no other.
    (out / "shards" / "shard-00000.safetensors").unlink()
    for options in ([], ["--adapter", adapter(target, tmp_path / "another", seed=1)]):
        code, _, err = cli(*job, *options, "--out", out)
        assert (code, "  target.adapter: cache has" in err) == (2, True), err
    assert cli("repair", out, "--yes")[0] == 1
    assert cli(*job, "--adapter", folder, "--out", out)[0] == 0
    assert cli("verify", out, "--recompute", "3", "--target", target, "--adapter", folder)[0] == 0
    code, _, err = cli("verify", out, "--recompute", "3", "--target", target)
    assert (code, "target.adapter" in err) == (2, True), err


@pytest.mark.parametrize("damage", ["absent", "no weights", "of another target"])
def test_an_adapter_that_cannot_be_used_is_told(target, job, cli, tmp_path, damage):
    folder = tmp_path / "adapter"
    if damage != "absent":
        adapter(target, folder)
    if damage == "no weights":
        (folder / "adapter_model.safetensors").unlink()
    if damage == "of another target":
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["nowhere"]}))
    code, _, err = cli(*job, "--adapter", folder, "--out", tmp_path / "c")
    assert (code, "--adapter" in err, "Traceback" in err) == (2, True, False), err


# -- changed meanwhile ------------------------------------------------------------------------------------------------


def replaced(target: Path) -> None:
    """By another file of the same name, size and time."""
    path = target / "model.safetensors"
    aside = path.with_name("aside")
    shutil.copy2(path, aside)
    add_one(aside)
    os.replace(aside, path)


@pytest.mark.parametrize(
    "how", [replaced, lambda target: add_one(target / "model.safetensors")], ids=["new", "in place"]
)
def test_weights_that_change_while_samples_are_prepared_are_refused(target, job, cli, tmp_path, monkeypatch, how):
    prepare = extractor.job.job.prepare

    def and_then(*arguments, **options):
        parts = prepare(*arguments, **options)
        how(target)
        return parts

    monkeypatch.setattr(extractor.job.job, "prepare", and_then)
    code, _, err = cli(*job, "--out", tmp_path / "c")
    assert (code, "model.safetensors was changed while this command ran" in err) == (2, True), err
    assert not list((tmp_path / "c" / "shards").iterdir())
    monkeypatch.undo()
    code, _, err = cli(*job, "--out", tmp_path / "c")
    assert (code, "  target.weights: cache has" in err) == (2, True), err


def test_weights_that_are_written_to_while_they_are_used_end_the_job(target, job, cli, tmp_path, monkeypatch):
    """On the CPU they are mapped into memory: the target that runs changes with the file."""
    forward = extractor.job.run_shards.ShardRunner.forward
    done = []

    def and_then(*arguments):
        forward(*arguments)
        done.append(1)
        if len(done) == 2:
            add_one(target / "model.safetensors")

    monkeypatch.setattr(extractor.job.run_shards.ShardRunner, "forward", and_then)
    code, _, err = cli(*job, "--out", tmp_path / "c")
    assert (code, "model.safetensors was changed" in err) == (2, True), err
    assert len(list((tmp_path / "c" / "shards").glob("*.safetensors"))) < 3


def test_a_target_that_is_touched_but_not_changed_goes_on(target, job, cli, tmp_path, monkeypatch):
    prepare = extractor.job.job.prepare

    def and_then(*arguments, **options):
        (target / "model.safetensors").touch()
        return prepare(*arguments, **options)

    monkeypatch.setattr(extractor.job.job, "prepare", and_then)
    code, _, err = cli(*job, "--out", tmp_path / "c")
    assert code == 0, err


def test_streamed_rows_that_change_while_they_are_read_are_not_kept(job, cli, tmp_path, monkeypatch):
    import extractor.data.prepare as prepare_module

    monkeypatch.setattr(prepare_module, "ROWS_PER_PART", 100)
    monkeypatch.setattr("extractor.data.division.Division.processes", lambda *_: 1)
    rows = [json.dumps({"input_ids": [5, 6, 7, n % 99], "loss_mask": [1, 1, 1, 1]}) + "\n" for n in range(3000)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(rows))
    write_part, parts = prepare_module.write_part, []

    def and_then(*arguments):
        write_part(*arguments)
        parts.append(1)
        if len(parts) == 2:
            with open(data, "r+b") as file:
                file.write("".join(row.replace("[5", "[8") for row in rows).encode())

    monkeypatch.setattr(prepare_module, "write_part", and_then)
    job = on(job, data)
    options = ("--streaming", "--limit", "3000", "--out", tmp_path / "c")
    code, _, err = cli(*job, *options)
    assert (code, "rows.jsonl was changed while its rows were read" in err) == (1, True), err
    assert len(list((tmp_path / "c" / "samples").iterdir())) == 2
    monkeypatch.setattr(prepare_module, "write_part", write_part)
    code, _, err = cli(*job, *options)
    assert (code, "  data.digest: cache has" in err) == (2, True), err
    data.write_text("".join(rows))
    assert cli(*job, *options)[0] == 0


# -- hardware and software --------------------------------------------------------------------------------------------


def test_another_processor_is_told_by_name_and_refused_where_asked(job, cli, tmp_path, monkeypatch):
    out = tmp_path / "c"
    assert cli(*job, "--out", out)[0] == 0
    made_with = Manifest.read(out).created_with
    assert {"cpu_capability", "device", "torch", "transformers", "accelerate", "python"} <= set(made_with)
    (out / "shards" / "shard-00001.safetensors").unlink()
    for name in ("index.arrow", "shards.arrow"):
        (out / name).unlink()
    cli("repair", out, "--yes")
    before = contents(out)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "ANOTHER")
    code, _, err = cli(*job, "--out", out, "--strict-hardware")
    assert (code, f"  cpu_capability: cache has '{made_with['cpu_capability']}', asked for 'ANOTHER'" in err) == (
        2,
        True,
    )
    assert contents(out) == before
    code, _, err = cli(*job, "--out", out)
    assert (code, f"cpu_capability {made_with['cpu_capability']} -> ANOTHER" in err) == (0, True), err


def test_the_same_hardware_says_nothing(job, cli, tmp_path):
    out = tmp_path / "c"
    assert cli(*job, "--out", out)[0] == 0
    (out / "shards" / "shard-00001.safetensors").unlink()
    cli("repair", out, "--yes")
    code, _, err = cli(*job, "--out", out, "--strict-hardware")
    assert (code, "warning" in err) == (0, False), err
