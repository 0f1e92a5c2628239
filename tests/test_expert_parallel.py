"""A mixture divided by experts over several processes gives the states of the whole one."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import commands
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_tensor_parallel import assert_same_states, ends, ranks
from tiny_models import LAYERS, VOCAB, build
from tiny_models import SIZES as MOST_SIZES
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from cache_format import FeatureCache, InputError
from cache_format.device import CPU
from extractor.target.hooks import HFDFlashTargetModel
from extractor.target.load_target import load_target
from extractor.target.parallel_plan import parallel_plan

TP = ("--tp-plan", "auto")
SIZES = {**MOST_SIZES, "pad_token_id": 0}
ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
MOE = {**SIZES, **ROUTED, "num_experts": 4, "head_dim": 8}
OSS = {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
GROUPS = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
DEEP = {**SIZES, **ROUTED, **LATENT, **GROUPS, "num_attention_heads": 3, "num_key_value_heads": 3}


@dataclass(frozen=True)
class Divided:
    """A target and how it is divided over two processes."""

    model: type
    config: object
    experts: str | None = None
    """the kernel of its experts"""
    expert_parallel: bool = True

    def load(self, folder: Path, tp_size: int | None) -> torch.nn.Module:
        return load_target(
            str(folder),
            revision=None,
            dtype=torch.float32,
            device=CPU,
            attn_implementation=None,
            trust_remote_code=False,
            experts_implementation=self.experts,
            tp_size=tp_size,
            expert_parallel=self.expert_parallel,
        )


CASES = {
    "eager": Divided(Qwen3MoeForCausalLM, Qwen3MoeConfig(**MOE), "eager"),
    "grouped_mm": Divided(Qwen3MoeForCausalLM, Qwen3MoeConfig(**MOE), "grouped_mm"),
    "batched_mm": Divided(Qwen3MoeForCausalLM, Qwen3MoeConfig(**MOE), "batched_mm"),
    "heads that do not divide": Divided(Qwen3MoeForCausalLM, Qwen3MoeConfig(**{**MOE, "num_key_value_heads": 1})),
    "no plan for its layers": Divided(GptOssForCausalLM, GptOssConfig(**OSS)),
    "only its experts in the plan": Divided(DeepseekV3ForCausalLM, DeepseekV3Config(**DEEP)),
    "attention that is not divided": Divided(
        Phi3ForCausalLM, Phi3Config(**{**SIZES, "hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3}),
        expert_parallel=False,
    ),
}  # fmt: skip


def states(model: torch.nn.Module) -> torch.Tensor:
    """``[3, 20, L*H]``, of all layers."""
    input_ids = torch.randint(VOCAB, (3, 20), generator=torch.Generator().manual_seed(1))
    ones = torch.ones_like(input_ids)
    return HFDFlashTargetModel(model, range(LAYERS)).generate_batch(input_ids, ones, ones).hidden_states


def part(rank: int, folder: Path) -> None:
    """One of two processes: its part of each target, and the states that both give."""
    torch.set_num_threads(1)
    os.environ.update(WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank))
    torch.distributed.init_process_group("gloo", f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    found = {}
    for name, case in CASES.items():
        model = case.load(folder / name, 2)
        if case.expert_parallel:
            whole = [tensor for key, tensor in model.named_parameters() if key.endswith("experts.down_proj")]
            assert {len(tensor.to_local()) for tensor in whole} == {2}
        found[name] = states(model)
    save_file(found, folder / f"rank-{rank}.safetensors")
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_states_of_one(tmp_path):
    for name, case in CASES.items():
        build(lambda case=case: case.model(case.config)).save_pretrained(tmp_path / name)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(commands.PRELOADED)
    processes = [context.Process(target=part, args=(rank, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    for rank in range(2):
        divided = load_file(tmp_path / f"rank-{rank}.safetensors")
        for name, case in CASES.items():
            whole = states(case.load(tmp_path / name, None)).unflatten(-1, (LAYERS, -1))
            off = (divided[name].view_as(whole) - whole).norm(dim=-1) / whole.norm(dim=-1)
            assert off.max() < 5e-6, name


@pytest.fixture(scope="module")
def moe_job(job, tiny_target, once) -> list[str]:
    """The job with a mixture of experts."""

    def make(folder: Path) -> None:
        shutil.copytree(tiny_target, folder)
        config = Qwen3MoeConfig(**{**MOE, "vocab_size": 2048, "max_position_embeddings": 4096})
        build(lambda: Qwen3MoeForCausalLM(config)).save_pretrained(folder)

    target = str(once("mixture", make))
    return [target if argument == str(tiny_target) else argument for argument in job] + ["--limit", "20"]


@pytest.mark.slow
def test_a_job_of_two_processes_with_some_experts_each(moe_job, cli, tmp_path, monkeypatch):
    """The states of one process within rounding; one process verifies them; not gone on with divided otherwise."""
    one, two = tmp_path / "one", tmp_path / "two"
    assert cli("extract", *moe_job, "--out", one)[0] == 0
    codes, errors = ends(ranks(2, *moe_job, "--out", two, "--expert-parallel"))
    assert codes == [0, 0], errors
    assert_same_states(one, two)
    assert FeatureCache.open(two).manifest.identity["expert_parallel"] is True
    assert "expert_parallel" not in FeatureCache.open(one).manifest.identity
    target = moe_job[moe_job.index("--target") + 1]
    code, out, errors = cli("verify", two, "--recompute", 3, "--target", target, "--device", "cpu")
    assert code == 0, out + errors
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    code, _, errors = cli("extract", *moe_job, "--out", two, *TP)
    assert (code, "expert_parallel: cache has true" in errors.lower()) == (2, True), errors


def test_experts_are_divided_over_processes_or_devices(moe_job, cli, tmp_path):
    code, _, errors = cli("extract", *moe_job, "--out", tmp_path / "cache", "--expert-parallel")
    assert (code, "give one of them too" in errors) == (2, True), errors
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("config", "size", "message"),
    [
        (Qwen3Config(**SIZES), 2, "transformers has no plan for experts of qwen3"),
        (Qwen3MoeConfig(**{**MOE, "mlp_only_layers": list(range(LAYERS))}), 2, "or it has none"),
        (
            Qwen3MoeConfig(**{**MOE, "num_experts": 6}),
            4,
            "4 processes do not divide the target's 6 experts; start 2",
        ),
        (MixtralConfig(**SIZES, num_local_experts=5), 2, "2 processes do not divide the target's 5 experts; start 5"),
    ],
    ids=["no-plan", "dense", "six", "five"],
)
def test_experts_that_cannot_be_divided_are_refused_before_loading(config, size, message):
    with pytest.raises(InputError, match=f"^--expert-parallel: .*{message}"):
        parallel_plan(config, size, expert_parallel=True)


def test_qwen3_235b_fits_the_eight_devices_of_a_node():
    """Its four key-value heads do not divide, its 128 experts do."""
    config = Qwen3MoeConfig(**{**MOE, "num_attention_heads": 64, "num_experts": 128, "num_key_value_heads": 4})
    with pytest.raises(InputError, match="or add --expert-parallel"):
        parallel_plan(config, 8)
    plan = parallel_plan(config, 8, expert_parallel=True)
    assert (plan.tp_size, plan.ep_size) == (8, 8)
    assert plan.tp_plan
    assert all("self_attn" in rule for rule in plan.tp_plan)


def test_a_target_without_a_plan_for_its_layers_is_told_of_its_experts():
    with pytest.raises(InputError, match="add --expert-parallel"):
        parallel_plan(GptOssConfig(**OSS), 2)


@pytest.mark.parametrize(("given", "option"), [({}, "--tp-plan"), ({"expert_parallel": True}, "--expert-parallel")])
def test_a_transformers_that_cannot_divide_so_is_named(monkeypatch, given, option):
    def older(tp_size=None):
        assert not given
        raise ImportError

    monkeypatch.setattr("transformers.distributed.DistributedConfig", older)
    with pytest.raises(InputError, match=f"^{option} needs transformers 5"):
        parallel_plan(Qwen3MoeConfig(**MOE), 2, **given)
