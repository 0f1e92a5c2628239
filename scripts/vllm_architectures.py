"""Tiny targets of many architectures, by vLLM as by transformers: python scripts/vllm_architectures.py [NAME ...]

Random weights, float32, on the CPU, engines in this process one after another. Rows of one token, of the maximum, two
alike, of one token repeated, one the beginning of another, all in one step; windows of 40 tokens. Printed is the
largest difference of a token in a layer, as a share of its norm. Fails if one is over 2e-6. Part of test_vllm.sh.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from cache_format.layout.captures import Captures
from extractor.config import TargetOptions
from extractor.target.hooks import HFDFlashTargetModel
from extractor.target.vllm import load

LENGTHS = [200, 1, 48, 48, 2, 199, 17, 5]
LAYERS = [4, 0, 2]
WITHIN = 2e-6
VOCABULARY = 512

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HEADS = {**SIZES, "head_dim": 32}
WINDOW = {"sliding_window": 40}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
# vLLM's kernel for CPUs has no other latent sizes.
LATENT = {"q_lora_rank": 64, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
DEEPSEEK = {**SIZES, **EXPERTS, **ROUTED, **LATENT, "num_key_value_heads": 4}
GRANITE = {
    "residual_multiplier": 0.22,
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.1,
    "logits_scaling": 8.0,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_d_state": 16}
HYBRID = {**MAMBA, "num_local_experts": 0, "shared_intermediate_size": 256, "layer_types": ["mamba", "attention"] * 3}
GEMMA = {**HEADS, **WINDOW, "query_pre_attn_scalar": 32}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 128, "n_layer": 6, "n_head": 4, "n_positions": 1024}


def rope(kind: str, **more: float) -> dict[str, Any]:
    """A configuration's rotary embedding."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **more}}


TRIED: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", HEADS),
    "Llama, tied embeddings": ("Llama", {**HEADS, "tie_word_embeddings": True}),
    "Llama, rotary linear": ("Llama", {**HEADS, **rope("linear", factor=2.0)}),
    "Qwen3, rotary yarn": ("Qwen3", {**HEADS, **rope("yarn", factor=4.0, original_max_position_embeddings=256)}),
    "Mistral, window": ("Mistral", {**HEADS, **WINDOW}),
    "Mixtral": ("Mixtral", {**HEADS, **LOCAL, "sliding_window": None}),
    "Qwen2": ("Qwen2", SIZES),
    "Qwen2-MoE": ("Qwen2Moe", {**SIZES, **EXPERTS, "shared_expert_intermediate_size": 64}),
    "Qwen3": ("Qwen3", HEADS),
    "Qwen3-MoE": ("Qwen3Moe", {**HEADS, **EXPERTS}),
    "Gemma": ("Gemma", HEADS),
    "Gemma 2": ("Gemma2", {**GEMMA, "tie_word_embeddings": True}),
    "Gemma 3": ("Gemma3Text", GEMMA),
    "Gemma 4": ("Gemma4Text", {**HEADS, **WINDOW}),
    "gpt-oss": ("GptOss", {**HEADS, **LOCAL, **WINDOW}),
    "Phi-3": ("Phi3", SIZES),
    "Cohere": ("Cohere", SIZES),
    "StableLM": ("StableLm", SIZES),
    "Granite": ("Granite", {**SIZES, **GRANITE}),
    "Granite-MoE": ("GraniteMoe", {**SIZES, **GRANITE, **LOCAL}),
    "Granite hybrid": ("GraniteMoeHybrid", {**SIZES, **GRANITE, **HYBRID}),
    "OLMoE": ("Olmoe", {**SIZES, "num_experts": 8, "num_experts_per_tok": 2}),
    "GPT-2": ("GPT2", GPT2),
    "DeepSeek-V2": ("DeepseekV2", {**DEEPSEEK, "n_group": 1}),
    "DeepSeek-V3": ("DeepseekV3", DEEPSEEK),
}


def made(kind: str, fields: dict[str, Any], folder: Path) -> nn.Module:
    """A target of that kind, its weights large enough that attention matters, saved and loaded again."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**fields)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "conv" not in name:
                parameter.normal_(0, 1.0 if "embed" in name or "wte" in name else parameter.shape[-1] ** -0.5)
            elif name.endswith("bias") or "sinks" in name:
                parameter.normal_(0, 0.3)
            elif "norm" in name or "ln_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    # Gemma 2's caps are for this kernel alone; the others leave them out.
    kernel = "eager" if kind == "Gemma2" else None
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=kernel)


def rows() -> list[Tensor]:
    """Token ids of the requests of one step."""
    random = torch.Generator().manual_seed(3)
    ids = [torch.randint(3, VOCABULARY, (length,), generator=random) for length in LENGTHS]
    ids[3], ids[6], ids[7] = ids[2].clone(), torch.full_like(ids[6], 7), ids[0][:5].clone()
    return ids


@torch.inference_mode()
def by_transformers(model: nn.Module, ids: Tensor) -> Tensor:
    """``[n, L, H]`` of one row, run alone."""
    seen: dict[int, Tensor] = {}
    with HFDFlashTargetModel(model.eval(), LAYERS).hooked(seen.__setitem__):
        model(input_ids=ids[None], use_cache=False)
    return torch.stack([seen[place].reshape(len(ids), -1) for place in range(len(LAYERS))], 1)


def by_vllm(folder: Path, ids: list[Tensor]) -> tuple[Tensor, str]:
    """``[n, L, H]`` of all rows in one step, and how they were captured."""
    engines, start = [], load._start

    def kept(*arguments: Any) -> Any:
        engines.append(start(*arguments))
        return engines[-1]

    load._start = kept
    try:
        options = TargetOptions(name=str(folder), backend="vllm")
        made_for: dict[str, Any] = {"longest": max(LENGTHS), "batch_tokens": sum(LENGTHS)}
        cpu = torch.device("cpu")
        backend = load.load_vllm(options, LAYERS, Captures(), dtype=torch.float32, device=cpu, **made_for)
        out, _ = backend.row_memory(sum(LENGTHS), cpu)
        backend.forward(nn.utils.rnn.pad_sequence(ids, batch_first=True), LENGTHS, out)
        return out.view(len(out), len(LAYERS), -1), backend.decided["vllm.capture"]
    finally:
        load._start = start
        for llm, _ in engines:
            llm.llm_engine.engine_core.shutdown()
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()
        gc.collect()


def main() -> None:
    # One process for all, so that vLLM is imported once; each target is compared here, on harder rows.
    load._executor = lambda *_: "uni"
    load.prove = lambda *_, **__: None
    failed = False
    for name in sys.argv[1:] or TRIED:
        with tempfile.TemporaryDirectory() as folder:
            model, ids = made(*TRIED[name], Path(folder)), rows()
            expected = torch.cat([by_transformers(model, row) for row in ids])
            states, how = by_vllm(Path(folder), ids)
            worst = float(((states - expected).norm(dim=-1) / expected.norm(dim=-1)).max())
        failed |= not worst <= WITHIN
        print(f"{name:24} {worst:.1e}  {how}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main()
