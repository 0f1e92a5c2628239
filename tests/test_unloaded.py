"""Refused from the target's configuration alone, before a row is read: what would else be refused after preparing."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from tiny_models import _SIZES, build, qwen3_moe
from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteMoeHybridConfig, MixtralConfig, Qwen3MoeConfig
from transformers.integrations import accelerate as accelerate_in_transformers

from cache_format.errors import InputError
from extractor.config import TargetOptions
from extractor.job import job as jobs
from extractor.target.load_target import load_target
from extractor.target.unloaded import require_runnable


@pytest.fixture
def nothing_prepared(monkeypatch):
    def prepared(*_: object, **__: object) -> None:
        raise AssertionError("rows were prepared")

    monkeypatch.setattr(jobs, "prepare", prepared)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--experts-implementation", "eager"), "--experts-implementation: Qwen3ForCausalLM has no experts"),
        (("--device-map", "auto"), "--device-map auto: "),
    ],
    ids=["experts", "map"],
)
def test_the_job_is_refused_before_it_prepares(cli, job, tmp_path, monkeypatch, nothing_prepared, options, why):
    monkeypatch.setattr(accelerate_in_transformers, "accelerate_max_memory", lambda given: {"cpu": 600_000})
    code, _, errors = cli("extract", *job, *options, "--out", tmp_path / "cache")
    assert code == 2
    assert why in errors
    assert not (tmp_path / "cache").exists()


def test_a_hosts_memory_beside_accelerators_counts_as_offloading(tiny_target, monkeypatch):
    from extractor.target import unloaded
    from extractor.target.load_target import load_config

    config = load_config(str(tiny_target), None, False)
    options = TargetOptions(name=str(tiny_target), device_map="auto")
    monkeypatch.setattr(accelerate_in_transformers, "accelerate_max_memory", lambda given: {"cpu": 1 << 30})
    require_runnable(options, config, torch.float32)
    monkeypatch.setattr(unloaded, "accelerators", lambda: [torch.device("cuda:0")])
    with pytest.raises(InputError, match=r"[\d,]{6,} of the target's [\d,]{6,} bytes .* offloaded"):
        require_runnable(options, config, torch.float32)


@pytest.mark.parametrize(
    ("config", "has_experts"),
    [
        (build(qwen3_moe).config, True),
        (MixtralConfig(**_SIZES, num_local_experts=4), True),
        # Dense, though their modules have experts for others.
        (Qwen3MoeConfig(**_SIZES, num_experts=0), False),
        (Qwen3MoeConfig(**_SIZES, num_experts=4, mlp_only_layers=list(range(5))), False),
        (GraniteMoeHybridConfig(**_SIZES, num_local_experts=0, layer_types=["attention"] * 5, mamba_n_heads=4), False),
    ],
    ids=["qwen3-moe", "mixtral", "no-experts", "dense-layers", "granite"],
)
def test_experts_are_looked_for_in_the_model_and_not_in_its_name(config, has_experts):
    options = TargetOptions(name="t", experts_implementation="grouped_mm")
    if has_experts:
        require_runnable(options, config, torch.float32)
        return
    with pytest.raises(InputError, match="has no experts"):
        require_runnable(options, config, torch.float32)


def test_code_that_cannot_do_without_weights_is_left_to_loading(tiny_target, tmp_path):
    """A target with code of its own, which looks at the values of its weights while it is built."""
    from extractor.target.load_target import load_config

    folder = shutil.copytree(tiny_target, tmp_path / "own")
    (folder / "own.py").write_text(
        "from transformers import Qwen3ForCausalLM\n"
        "class Own(Qwen3ForCausalLM):\n"
        "    def __init__(self, config):\n"
        "        super().__init__(config)\n"
        "        self.scale = self.lm_head.weight.sum().item()\n"
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "own.Own"}}))
    options = TargetOptions(name=str(folder), experts_implementation="eager", trust_remote_code=True)
    loaded = load_config(str(folder), None, True)
    require_runnable(options, loaded, torch.float32)


def test_a_capped_target_is_not_run_by_the_kernel_that_leaves_the_cap_out(tmp_path):
    config = Gemma2Config(**_SIZES, sliding_window=6, attn_logit_softcapping=0.2)
    build(lambda: Gemma2ForCausalLM(config)).save_pretrained(tmp_path)
    ids = torch.arange(3, 12)[None]
    how = {"dtype": torch.float32, "device": torch.device("cpu"), "revision": None, "trust_remote_code": False}
    model = load_target(str(tmp_path), attn_implementation=None, **how)
    assert model.config._attn_implementation == "eager"
    capped = model.model(input_ids=ids).last_hidden_state
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    assert not torch.allclose(model.model(input_ids=ids).last_hidden_state, capped, rtol=1e-4)
    with pytest.raises(InputError, match="leaves out; use eager"):
        require_runnable(TargetOptions(name=str(tmp_path), attn_implementation="sdpa"), config, torch.float32)
