"""A tiny Qwen2 in GGUF, its matrices rounded to Q8_0, and the same model in safetensors with the weights so rounded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
Q8 = gguf.GGMLQuantizationType.Q8_0


def write_gguf(tokenizer_of: Path, out: Path) -> None:
    """Write a model to ``out / "model.gguf"``, and with its weights so rounded to ``out / "rounded"``.

    Not a Qwen3: transformers reads no head size out of a GGUF of that.
    """
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), **SIZES, **special))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    out.mkdir()
    writer = gguf.GGUFWriter(str(out / "model.gguf"), "qwen2")
    _write_sizes(writer, model.config)
    _write_tokenizer(writer, tokenizer)
    rounded = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        values = tensor.numpy()
        if tensor.ndim == 1:
            writer.add_tensor(_gguf_name(name), values)
            rounded[name] = tensor
            continue
        blocks = gguf.quants.quantize(values, Q8)
        writer.add_tensor(_gguf_name(name), blocks, raw_dtype=Q8)
        rounded[name] = torch.from_numpy(gguf.quants.dequantize(blocks, Q8).copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model.load_state_dict(rounded, strict=False)
    model.save_pretrained(out / "rounded")
    tokenizer.save_pretrained(out / "rounded")


def _gguf_name(name: str) -> str:
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    _, _, layer, rest = name.split(".", 3)
    rest, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{_NAMES[rest]}.{kind}"


def _write_sizes(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)


def _write_tokenizer(writer: gguf.GGUFWriter, tokenizer: Any) -> None:
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    special = {entry["id"] for entry in backend["added_tokens"]}
    by_id = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    normal, control = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([token for token, _ in by_id])
    writer.add_token_types([control if number in special else normal for _, number in by_id])
    writer.add_token_merges([" ".join(pair) for pair in backend["model"]["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
