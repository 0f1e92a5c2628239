"""Tiny mixtures of experts, with the tokenizer of a tiny target: make_expert_targets.py TINY MOE MLA"""

from __future__ import annotations

import sys

import torch
from transformers import AutoTokenizer, DeepseekV3Config, DeepseekV3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

SIZES = {
    "vocab_size": 2000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 4096,
}
# The latent sizes are those of DeepSeek-V3: vLLM's kernel for CPUs has no others.
LATENT = {"q_lora_rank": 128, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
GROUPS = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}


def main() -> None:
    tiny, moe, mla = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    torch.manual_seed(0)
    experts = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, num_key_value_heads=2, head_dim=64, num_experts=8))
    latent = DeepseekV3ForCausalLM(DeepseekV3Config(**SIZES, **LATENT, **GROUPS, num_key_value_heads=4))
    for model, folder in ((experts, moe), (latent, mla)):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
