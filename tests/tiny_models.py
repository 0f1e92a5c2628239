"""Tiny random-weight models of real transformers classes, and odd ones that are not."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn
from transformers import (
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SiglipVisionConfig,
)

VOCAB, HIDDEN, LAYERS = 99, 32, 5
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
"""What most architectures call the same."""
_SIZES = {**SIZES, "head_dim": 8}


def qwen3() -> nn.Module:
    return Qwen3ForCausalLM(Qwen3Config(**_SIZES))


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**_SIZES))


def gemma3() -> nn.Module:
    """Its sliding window of 6 tokens is shorter than the tests' sequences."""
    return Gemma3ForCausalLM(Gemma3TextConfig(**_SIZES, sliding_window=6, sliding_window_pattern=2))


def qwen3_moe() -> nn.Module:
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**_SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, decoder_sparse_step=1)
    )


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=HIDDEN, n_layer=LAYERS, n_head=4, n_positions=256))


def gemma3_multimodal() -> nn.Module:
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = Gemma3TextConfig(**_SIZES, sliding_window=6)
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=VOCAB - 1)
    return Gemma3ForConditionalGeneration(config)


BUILDERS = (qwen3, llama, gemma3, qwen3_moe, gpt2, gemma3_multimodal)


def build(builder) -> nn.Module:
    """The same weights at every call, float32, large enough that attention matters."""
    torch.manual_seed(0)
    model = builder()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return model.eval()


class OddModel(nn.Module):
    """Layers mixed over the sequence by ``mix [B, S, H], mask -> [B, S, H]``; none of transformers' flags declared."""

    def __init__(self, mix, layers=None, output=lambda h: h, wrap=lambda h: h):
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(num_hidden_layers=3)
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        blocks = [nn.Linear(HIDDEN, HIDDEN) for _ in range(3)]
        by_name = {str(i): block for i, block in enumerate(blocks)}
        self.layers = nn.ModuleDict(by_name) if layers == "dict" else nn.ModuleList(blocks)
        self.mix, self.output, self.wrap = mix, output, wrap
        for block in blocks:
            block.register_forward_hook(lambda _m, _i, h: self.wrap(h))

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, attention_mask=None):
        h = self.embed(input_ids)
        layers = self.layers.values() if isinstance(self.layers, nn.ModuleDict) else self.layers
        for layer in layers:
            h = layer(self.mix(h, attention_mask))
            h = h[0] if isinstance(h, tuple) else h
        return self.output(h)


def causal(h: torch.Tensor, _mask) -> torch.Tensor:
    """Each token sees itself and those before it."""
    return h + h.cumsum(1)


def bidirectional(h: torch.Tensor, mask) -> torch.Tensor:
    """Each token sees all tokens that the mask lets it."""
    mask = torch.ones(h.shape[:2]) if mask is None else mask.to(h.dtype)
    return h + (h * mask[..., None]).sum(1, keepdim=True) / mask.sum(1)[:, None, None]


def careless(h: torch.Tensor, _mask) -> torch.Tensor:
    """Each token sees all tokens, masked or not."""
    return h + h.mean(1, keepdim=True)
