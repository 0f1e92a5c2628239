"""Tiny targets with quantised weights, as their makers would publish them: config.json says how, and that it is so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM, Qwen3Config, Qwen3ForCausalLM

VOCAB = 512
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
}
_BLOCK = 128


def plain(folder: Path) -> nn.Module:
    """What the others are made of, in bfloat16."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**_SIZES, intermediate_size=256)).to(torch.bfloat16).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    model.save_pretrained(folder)
    return model


def say_quantised(folder: Path, **how: Any) -> None:
    """Let the config.json in ``folder`` say that weights are quantised."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": how}))


def fp8(folder: Path) -> dict[str, torch.Tensor]:
    """Fine-grained: blocks of 128 x 128 share a scale. Gives the weights as they are meant, in bfloat16."""
    stored, meant = {}, {}
    for name, weight in plain(folder).state_dict().items():
        stored[name] = meant[name] = weight.contiguous()
        if name.endswith("proj.weight"):
            blocks = weight.float().unflatten(1, (-1, _BLOCK)).unflatten(0, (-1, min(_BLOCK, len(weight))))
            scales = blocks.abs().amax((1, 3)) / 448
            rounded = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
            stored[name] = rounded.reshape(weight.shape)
            stored[f"{name}_scale_inv"] = scales
            meant[name] = (rounded.float() * scales[:, None, :, None]).reshape(weight.shape).bfloat16()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    say_quantised(folder, quant_method="fp8", weight_block_size=[_BLOCK, _BLOCK], activation_scheme="dynamic")
    return meant


def mxfp4(folder: Path) -> None:
    """A gpt-oss whose experts are 4 bits with a shared exponent for each 32 of them."""
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e4}
    sizes = {**_SIZES, "intermediate_size": 128, "num_local_experts": 4, "num_experts_per_tok": 2}
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    config = GptOssConfig(**sizes, sliding_window=32, layer_types=layers, rope_parameters=rope)
    model = GptOssForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    stored = {}
    for name, weight in model.state_dict().items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inside, outside = weight.shape
            shape = (experts, outside, inside // 32)
            stored[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
            stored[f"{name}_scales"] = torch.randint(118, 122, shape, dtype=torch.uint8)
        else:
            stored[name] = weight.contiguous()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    say_quantised(folder, quant_method="mxfp4", modules_to_not_convert=kept)


def _by_transformers(folder: Path, how: Any) -> None:
    plain(folder)
    options = {"quantization_config": how, "dtype": torch.bfloat16, "device_map": {"": "cpu"}}
    AutoModelForCausalLM.from_pretrained(folder, **options).save_pretrained(folder)


def torchao_int8(folder: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    _by_transformers(folder, TorchAoConfig(Int8WeightOnlyConfig()))


def torchao_int8_dynamic(folder: Path) -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig
    from transformers import TorchAoConfig

    _by_transformers(folder, TorchAoConfig(Int8DynamicActivationInt8WeightConfig()))


def bitsandbytes_8(folder: Path) -> None:
    from transformers import BitsAndBytesConfig

    _by_transformers(folder, BitsAndBytesConfig(load_in_8bit=True))


def bitsandbytes_4(folder: Path) -> None:
    from transformers import BitsAndBytesConfig

    _by_transformers(folder, BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16))


def compressed_tensors(folder: Path, scheme: str) -> None:
    """By a scheme that the package knows by name, such as W4A16."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationStatus,
        apply_quantization_config,
        preset_name_to_scheme,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

    model = plain(folder)
    groups = {"group_0": preset_name_to_scheme(scheme, targets=["Linear"])}
    apply_quantization_config(
        model,
        QuantizationConfig(
            config_groups=groups, ignore=["lm_head"], quantization_status=QuantizationStatus.INITIALIZED
        ),
    )
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            weights = module.quantization_scheme.weights
            grouped = module.weight.data.float()
            grouped = grouped.unflatten(1, (-1, weights.group_size)) if weights.group_size else grouped[:, None]
            scales, _ = calculate_qparams(grouped.amin(-1), grouped.amax(-1), weights)
            module.weight_scale.data.copy_(scales.reshape(module.weight_scale.shape))
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
