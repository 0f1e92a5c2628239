"""Loading a target: shapes, digests that identify it, and errors that say what to do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import late_device
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import HIDDEN, LAYERS, VOCAB, build, gemma3_multimodal, gpt2, qwen3, qwen3_moe
from transformers import AutoTokenizer
from transformers.integrations import accelerate as accelerate_in_transformers

from cache_format.errors import InputError
from cache_format.layout.embeddings import load_input_embeddings, load_output_embeddings
from cache_format.layout.manifest import TargetInfo
from extractor.config import TargetOptions
from extractor.target.in_fact import decided_in_fact
from extractor.target.load_target import (
    TargetShape,
    load_config,
    load_target,
    load_tokenizer,
    load_wanted,
    resolve_device,
    resolve_dtype,
)
from extractor.target.target_files import write_target_files
from extractor.target.target_identity import identify_target, tokenizer_identity

CPU = torch.device("cpu")


def load(name, **options) -> torch.nn.Module:
    defaults = {"revision": None, "dtype": torch.float32, "device": CPU, "attn_implementation": None}
    return load_target(str(name), **{**defaults, "trust_remote_code": False, **options})


@pytest.mark.parametrize("builder", [qwen3, gpt2, gemma3_multimodal], ids=lambda b: b.__name__)
def test_shape_and_weights_of_a_saved_model(builder, tmp_path):
    model = build(builder)
    model.save_pretrained(tmp_path)
    config = load_config(str(tmp_path), None, False)
    shape = TargetShape.from_config(config)
    assert (shape.hidden_size, shape.num_hidden_layers, shape.vocab_size) == (HIDDEN, LAYERS, VOCAB)
    loaded = load(tmp_path, dtype=torch.bfloat16)
    assert type(loaded) is type(model)
    assert not loaded.training
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in loaded.parameters())


def test_attention_can_be_chosen(tiny_target):
    assert load(tiny_target, attn_implementation="eager").config._attn_implementation == "eager"
    with pytest.raises(InputError, match="--target"):
        load(tiny_target, attn_implementation="flash_attention_2")


@pytest.mark.parametrize("kernel", ["eager", "batched_mm", "grouped_mm"])
def test_the_kernel_of_experts_can_be_chosen(kernel, tmp_path):
    build(qwen3_moe).save_pretrained(tmp_path)
    ids = torch.arange(24)[None] % VOCAB
    expected = build(qwen3_moe)(ids).logits
    options = TargetOptions(name=str(tmp_path), experts_implementation=kernel)
    loaded = load_wanted(options, torch.float32, CPU, None)
    assert decided_in_fact(loaded)["experts_implementation"] == kernel
    torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", ["eager", "batched_mm", "grouped_mm"])
def test_a_target_without_experts_has_no_kernel_for_them(kernel, tiny_target):
    with pytest.raises(InputError, match="experts"):
        load_wanted(TargetOptions(name=str(tiny_target), experts_implementation=kernel), torch.float32, CPU, None)
    with pytest.raises(InputError, match="--experts-implementation 'fast'"):
        TargetOptions(name=str(tiny_target), experts_implementation="fast")


def test_a_device_map_that_offloads_is_refused_with_the_sizes(tiny_target, monkeypatch):
    monkeypatch.setattr(accelerate_in_transformers, "accelerate_max_memory", lambda given: {"cpu": 600_000})
    with pytest.raises(InputError, match=r"--device-map auto: [\d,]{6,} of the target's [\d,]{6,} bytes .* offloaded"):
        load(tiny_target, device_map="auto")


def loaded_late(target: str, memory: int) -> tuple[set[str], set[str], int, list[int]] | str:
    """Where the weights are once transformers has loaded them, where they end, their bytes, and those of each copy."""
    late = late_device.install(memory=memory)
    at_first: set[str] = set()
    move = torch.nn.Module.to

    def to(model: torch.nn.Module, *arguments: object) -> torch.nn.Module:
        at_first.update(str(weight.device) for weight in model.parameters())
        return move(model, *arguments)

    torch.nn.Module.to = to  # type: ignore[method-assign]
    try:
        model = load(target, device=torch.device("late", 0))
    except InputError as error:
        return str(error)
    weights = list(model.parameters())
    return at_first, {str(weight.device) for weight in weights}, sum(weight.nbytes for weight in weights), late.crossed


def test_weights_go_straight_to_the_device(tiny_target):
    """The host never holds the whole model: it is there before anything could move it, tensor by tensor."""
    at_first, at_last, size, copies = late_device.in_a_process(loaded_late, str(tiny_target), 1 << 30)
    assert at_first == at_last == {"late:0"}
    assert max(copies) < size / 2
    assert size <= sum(copies) < 1.01 * size, "each crosses the bus once"


def test_weights_that_do_not_fit_are_told(tiny_target):
    said = late_device.in_a_process(loaded_late, str(tiny_target), 1_000_000)
    assert "its weights do not fit on late:0; choose a larger --device" in said


def test_errors_say_what_to_do(tmp_path, tiny_target):
    with pytest.raises(InputError, match="no such folder"):
        load_config(str(tmp_path / "nowhere"), None, False)
    with pytest.raises(InputError, match="no such folder here; if you mean the hub"):
        load_config("nobody/no-such-model", None, False)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="--target"):
        load_config(str(tmp_path), None, False)
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "evil"}))
    with pytest.raises(InputError, match="--trust-remote-code"):
        load_config(str(tmp_path), None, False)
    bare = shutil.copytree(tiny_target, tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no weights"):
        identify_target(str(bare), None, load_config(str(bare), None, False))


def test_the_identity_follows_content_not_place(tiny_target, tmp_path):
    def identity(folder) -> dict[str, str]:
        return identify_target(str(folder), None, load_config(str(folder), None, False)).fields

    moved = shutil.copytree(tiny_target, tmp_path / "moved")
    assert identity(moved) == identity(tiny_target)
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    changed = identity(moved)
    assert changed["config"] != identity(tiny_target)["config"]
    assert changed["weights"] == identity(tiny_target)["weights"]
    weights = load_file(moved / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, moved / "model.safetensors", metadata={"format": "pt"})
    assert identity(moved)["weights"] != changed["weights"]


def test_the_tokenizer_identity_is_the_same_in_every_process(tiny_target):
    code = (
        "import sys; from extractor.target.load_target import *; from extractor.target.target_identity import *; "
        "print(sorted(tokenizer_identity(load_tokenizer(sys.argv[1], None, False)).items()))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code, str(tiny_target)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
    tokenizer = load_tokenizer(str(tiny_target), None, False)
    before = tokenizer_identity(tokenizer)
    tokenizer.chat_template += " "
    after = tokenizer_identity(tokenizer)
    assert before["tokenizer"] == after["tokenizer"]
    assert before["chat_template"] != after["chat_template"]
    tokenizer.add_tokens(["brandnew"])
    assert tokenizer_identity(tokenizer)["tokenizer"] != before["tokenizer"]


def test_devices_and_dtypes():
    assert resolve_device("cpu") == CPU
    assert resolve_device("cpu:0").type == "cpu"
    assert resolve_dtype("auto", CPU) == "float32"
    assert resolve_dtype("auto", torch.device("cuda")) == "bfloat16"
    for bad in ("tpu9", "cuda:99", "mps", "meta", "xpu", "mps:0"):
        with pytest.raises(InputError, match="--device"):
            resolve_device(bad)
    with pytest.raises(InputError, match="--dtype"):
        resolve_dtype("int8", CPU)


@pytest.mark.parametrize("builder", [qwen3, gpt2, gemma3_multimodal], ids=lambda b: b.__name__)
def test_the_caches_embeddings_do_what_the_targets_do(builder, tmp_path, tiny_target):
    """Tied, untied, and Gemma's scaled ones."""
    model = build(builder)
    (tmp_path / "target").mkdir()
    tied, scale = write_target_files(tmp_path, model, model.config, AutoTokenizer.from_pretrained(tiny_target))
    info = TargetInfo(
        name="t",
        model_type="t",
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        vocab_size=VOCAB,
        tie_word_embeddings=tied,
        embed_scale=scale,
    )
    assert tied is (builder is not qwen3)
    ids, states = torch.arange(10), torch.randn(4, HIDDEN)
    assert torch.equal(load_input_embeddings(tmp_path, info)(ids), model.get_input_embeddings()(ids))
    assert torch.equal(load_output_embeddings(tmp_path, info)(states), model.get_output_embeddings()(states))
