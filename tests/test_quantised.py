"""Targets with quantised weights: their states are stored as they come, and what was decided is in the identity.

torchao, compressed-tensors and bitsandbytes are no part of the suite's environment: scripts/test_quantised.sh has them.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import quantised_models as models
import torch
from torch import Tensor, nn
from transformers import Qwen3ForCausalLM
from transformers.quantizers import AutoHfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from cache_format import FeatureCache
from cache_format.device import CPU
from cache_format.errors import InputError
from extractor.config import TargetOptions
from extractor.target.hooks import HFDFlashTargetModel
from extractor.target.in_fact import decided_in_fact
from extractor.target.load_target import load_config, load_wanted
from extractor.target.quantised import dense_weight, run_dtype
from extractor.target.transformers_backend import UNMASKED, TransformersBackend

IDS = (torch.arange(40) * 37 % models.VOCAB)[None]


@functools.cache
def _registered() -> None:
    """``halves``: says that it makes float16 of everything; ``liar``: does so, but does not say it."""

    class Config(QuantizationConfigMixin):
        def __init__(self, quant_method: str, **_: Any):
            self.quant_method = quant_method

    class Halves(HfQuantizer):
        def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
            return torch.float16

        @property
        def is_trainable(self) -> bool:
            return False

        def is_serializable(self) -> bool:
            return True

    class Liar(Halves):
        def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
            return dtype

        def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
            for parameter in model.parameters():
                parameter.data = parameter.data.half()
            return model

    for name, quantiser in (("halves", Halves), ("liar", Liar)):
        register_quantization_config(name)(Config)
        register_quantizer(name)(quantiser)


@pytest.fixture(scope="module")
def target(tmp_path_factory, tiny_target) -> Callable[[str], Path]:
    """The folder of a quantised target, with a tokenizer."""
    packages = {name: name for name in ("torchao", "bitsandbytes")} | dict.fromkeys("WF", "compressed_tensors")

    @functools.cache
    def made(kind: str) -> Path:
        for prefix, package in packages.items():
            if kind.startswith(prefix):
                pytest.importorskip(package)
        folder = tmp_path_factory.mktemp("targets") / kind
        if kind in ("halves", "liar", "awq", "gptq", "unknown"):
            _registered()
            models.plain(folder)
            models.say_quantised(folder, quant_method=kind, bits=4, group_size=128)
        elif kind.startswith(("W", "F")):
            models.compressed_tensors(folder, kind)
        else:
            getattr(models, kind)(folder)
        for path in tiny_target.glob("*token*"):
            shutil.copy(path, folder)
        return folder

    return made


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "ids.jsonl"
    some = [{"input_ids": IDS[0, : 40 - 3 * n].tolist(), "loss_mask": [1] * (40 - 3 * n)} for n in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in some))
    return path


def job(folder: Path, rows: Path, out: Path, *options: str) -> list[object]:
    # A row a batch: what is beside it may change the rounding.
    where = ["--data", rows, "--device", "cpu", "--target-layers", "0,2", "--batch-tokens", "40", "--out", out]
    return ["extract", "--target", folder, *where, *options]


def states(model: nn.Module, dtype: torch.dtype) -> Tensor:
    """``[40, 2*H]`` of layers 0 and 2, which have to come in ``dtype``."""
    out = torch.empty(40, 2 * 128, dtype=dtype)
    TransformersBackend(HFDFlashTargetModel(model, [0, 2]), UNMASKED, dtype=dtype).forward(IDS, [40], out)
    return out


def asked(folder: Path, dtype: str) -> str:
    options = TargetOptions(name=str(folder), dtype=dtype)
    return run_dtype(options, load_config(str(folder), None, False), CPU)


def test_fp8_without_a_device_for_it_is_that_of_its_dequantised_weights(target, rows, tmp_path, cli):
    code, _, errors = cli(*job(target("fp8"), rows, tmp_path / "cache"))
    assert code == 0, errors
    cache = FeatureCache.open(tmp_path / "cache")
    meant = models.fp8(tmp_path / "again")
    models.plain(tmp_path / "plain")
    right = load_wanted(TargetOptions(name=str(tmp_path / "plain")), torch.bfloat16, CPU, None)
    right.load_state_dict(meant)
    assert cache.manifest.dtype == "bfloat16"
    sample = cache[0].hidden_states[0]
    assert torch.equal(sample, states(right, torch.bfloat16)[: len(sample)])
    assert cache.manifest.identity["parameters"] == "bfloat16 36"
    assert torch.equal(cache.get_output_embeddings().weight, right.lm_head.weight)
    assert cli("verify", tmp_path / "cache", "--recompute", "2", "--target", target("fp8"), "--device", "cpu")[0] == 0


@pytest.mark.parametrize("kind", ["fp8", "halves"])
def test_a_dtype_that_it_does_not_compute_in_is_refused_before_anything(target, rows, tmp_path, cli, kind):
    code, _, errors = cli(*job(target(kind), rows, tmp_path / "cache", "--dtype", "float32"))
    assert code == 2
    runs_in = {"fp8": "bfloat16", "halves": "float16"}[kind]
    assert f"computes in {runs_in}, and its states are stored as they are; pass --dtype {runs_in}" in errors
    assert not (tmp_path / "cache").exists()


def test_a_package_that_changes_the_dtype_is_recorded(target, rows, tmp_path, cli):
    """AWQ makes float16 of bfloat16 where its kernels want that."""
    assert cli(*job(target("halves"), rows, tmp_path / "cache"))[0] == 0
    cache = FeatureCache.open(tmp_path / "cache")
    assert cache.manifest.dtype == cache.manifest.identity["dtype"] == "float16"
    assert cache[0].hidden_states.dtype == torch.float16
    assert cache.manifest.identity["quantization"] == "halves"
    right = Qwen3ForCausalLM.from_pretrained(target("halves"), dtype=torch.float16).eval()
    assert torch.equal(cache[0].hidden_states[0], states(right, torch.float16))


def test_one_that_does_not_say_so_is_found_out(target, rows, tmp_path, cli):
    code, _, errors = cli(*job(target("liar"), rows, tmp_path / "cache"))
    assert code == 2, errors
    assert "--dtype bfloat16: the quantised target" in errors
    assert "computes in float16" in errors
    assert not list(tmp_path.glob("cache/shards/*.safetensors"))


def test_what_cannot_be_run_here_is_refused_with_the_package(target, rows, tmp_path, cli):
    for kind, package in (("awq", "gptqmodel"), ("gptq", "optimum"), ("unknown", "")):
        if package and find_spec(package):
            continue
        code, _, errors = cli(*job(target(kind), rows, tmp_path / "cache"))
        why = f"quantised by {kind}, which cannot be run here: " if package else "does not know and would"
        assert (code, why in errors, package in errors) == (2, True, True), errors
        assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(("on_a_gpu", "runs_in"), [(True, "float16"), (False, "bfloat16")])
def test_what_awq_makes_of_bfloat16_is_asked_of_transformers(target, monkeypatch, on_a_gpu, runs_in):
    """Its own class decides; the package with its kernels is not needed for that."""
    monkeypatch.setattr("transformers.quantizers.quantizer_awq.is_gptqmodel_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_a_gpu)
    assert asked(target("awq"), "auto") == asked(target("awq"), runs_in) == runs_in
    with pytest.raises(InputError, match=f"computes in {runs_in}, and its states are stored as they are"):
        asked(target("awq"), {"float16": "bfloat16", "bfloat16": "float16"}[runs_in])


def test_mxfp4_is_dequantised_in_any_dtype(target, rows, tmp_path, cli):
    assert asked(target("mxfp4"), "auto") == "bfloat16"
    for dtype in ("auto", "float32"):
        code, _, errors = cli(*job(target("mxfp4"), rows, tmp_path / dtype, "--dtype", dtype))
        assert code == 0, errors
    low, high = (FeatureCache.open(tmp_path / dtype)[0].hidden_states[0] for dtype in ("auto", "float32"))
    assert (low.dtype, high.dtype) == (torch.bfloat16, torch.float32)
    # A token may go to another expert in another precision.
    near = (low.float() - high).norm(dim=-1) <= 0.1 * high.norm(dim=-1)
    assert near.float().mean() > 0.8


KINDS = {
    "torchao_int8": ("torchao, Int8Tensor 21", 0.03),
    "torchao_int8_dynamic": ("torchao, Int8Tensor 21", 0.1),
    "bitsandbytes_8": ("bitsandbytes, Int8Params 21, Linear8bitLt 21", 0.1),
    "bitsandbytes_4": ("bitsandbytes, Linear4bit 21, Params4bit 21", 0.5),
    "W8A16": ("compressed-tensors", 0.03),
    "W4A16": ("compressed-tensors", 0.5),
    "W8A8": ("compressed-tensors", 0.1),
    "FP8_DYNAMIC": ("compressed-tensors", 0.15),
}
"""What the identity says, and how far states may be from those of the target that was quantised."""


@pytest.mark.parametrize("kind", KINDS)
def test_states_come_as_the_package_computes_them(target, rows, tmp_path, cli, kind):
    said, tolerance = KINDS[kind]
    code, _, errors = cli(*job(target(kind), rows, tmp_path / "cache"))
    assert code == 0, errors
    cache = FeatureCache.open(tmp_path / "cache")
    assert cache.manifest.dtype == "bfloat16"
    assert cache.manifest.identity["quantization"] == said
    model = load_wanted(TargetOptions(name=str(target(kind))), torch.bfloat16, CPU, None)
    assert torch.equal(cache[0].hidden_states[0], states(model, torch.bfloat16))
    right = states(models.plain(tmp_path / "plain"), torch.bfloat16).float()
    error = (cache[0].hidden_states[0].float() - right).norm() / right.norm()
    assert 0 < error < tolerance
    assert torch.equal(cache.get_output_embeddings().weight, models.plain(tmp_path / "plain").lm_head.weight)
    assert cli("verify", tmp_path / "cache", "--recompute", "2", "--target", target(kind), "--device", "cpu")[0] == 0


@pytest.mark.parametrize("kind", ["torchao_int8", "W4A16", "bitsandbytes_8"])
def test_float32_where_the_package_can(target, rows, tmp_path, cli, kind):
    code, _, errors = cli(*job(target(kind), rows, tmp_path / "cache", "--dtype", "float32"))
    if kind == "bitsandbytes_8":
        assert (code, "pass --dtype bfloat16" in errors) == (2, True), errors
        return
    assert code == 0, errors
    assert FeatureCache.open(tmp_path / "cache")[0].hidden_states.dtype == torch.float32


def test_a_target_that_runs_on_quantised_weights_says_what_holds_them(target):
    target("halves")
    model = Qwen3ForCausalLM.from_pretrained(target("halves")).eval()
    model.model.layers[0].mlp.up_proj = _Rows(4, 4)
    assert decided_in_fact(model)["quantization"] == "halves, _Rows 1"
    assert "quantization" not in decided_in_fact(models.plain(target("halves").parent / "plain"))


class _Rows(nn.Linear):
    """Of 8 bits and a scale a row."""

    def __init__(self, inside: int, outside: int):
        super().__init__(inside, outside)
        self.scale = self.weight.detach().abs().amax(1, keepdim=True) / 127
        rounded = (self.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(rounded, requires_grad=False)  # type: ignore[assignment]

    def forward(self, states: Tensor) -> Tensor:
        return states @ (self.weight * self.scale).to(states.dtype).T + self.bias.to(states.dtype)


def test_a_quantised_head_is_written_as_what_it_multiplies_by():
    head = _Rows(16, 40)
    torch.testing.assert_close(dense_weight(head, torch.float32), head.weight * head.scale)
    plain = nn.Linear(4, 5)
    assert dense_weight(plain, torch.bfloat16) is plain.weight


def test_the_stand_ins_are_known_to_transformers(target):
    target("halves")
    assert AutoHfQuantizer.supports_quant_method({"quant_method": "halves"})
    with pytest.raises(InputError, match="--dtype 'int8'"):
        asked(target("halves"), "int8")
