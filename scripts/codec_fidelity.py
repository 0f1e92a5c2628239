"""What codecs change in a real target: size, SNR token by token, and what the target then says.

    python scripts/bench_codec.py --states CACHE --target TARGET --out FOLDER

CACHE is raw and was extracted from TARGET (scripts/real_target.py makes one). For each codec: stored bytes over bytes
before; SNR of tokens in each layer (median, worst, and the first tokens of samples apart, whose states are massive);
GB/s of one core, sample by sample; for each layer the KL divergence, in nats a token, of the target's own next-token
distribution once that layer's output is replaced by what the codec makes of it. Writes codecs.json and codecs.svg.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache_format import FeatureCache
from cache_format.codecs import BlockCodec, Codec, RowCodec, States, codec_named
from cache_format.codecs.dtypes import DTYPES
from cache_format.writing.encode import bits_of

TRIED = ("zbits", "fp8", "quant:24dB", "quant", "quant:34dB", "quant:fine")
CALIBRATION_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """Of one codec."""

    codec: str
    ratio: float
    snr_db: list[float]
    """of each layer, the median of the tokens that are not the first of a sample"""
    worst_db: list[float]
    """of the worst of these"""
    first_db: list[float]
    """of first tokens, the median"""
    encode: float
    """GB/s of one core: median of rounds, in processor time"""
    decode: float
    kl: list[float]
    """nats a token, with each layer put back alone"""


class OneCodec:
    """A codec that knows the states, and memory for samples."""

    def __init__(self, codec: Codec, states: States, seen: Tensor, longest: int):
        """``seen [n, L*H]``: what the codec finds out of the states, it finds out of these."""
        self.codec, self.states = codec.calibrated(seen, states), states
        if isinstance(codec, BlockCodec):
            self._shared = codec.shared(bits_of(seen, states), states)
            self._memory = np.empty(codec.most_bytes(longest, states), np.uint8)
        else:
            assert isinstance(codec, RowCodec)
            tensors = codec.tensors(states)
            self._stored = {t.name: torch.empty(t.shape(longest), dtype=DTYPES[t.dtype]) for t in tensors}
        self._count, self._size = 0, 0

    def encode(self, rows: Tensor) -> int:
        """Stored bytes of a sample ``[n, L*H]``."""
        self._count = len(rows)
        if isinstance(self.codec, BlockCodec):
            bits = bits_of(rows, self.states)
            energy = np.zeros((len(rows), 2, self.states.layers))
            self._size = self.codec.encode_sample(bits, self._shared, self._memory, self.states, energy)
            return self._size
        assert isinstance(self.codec, RowCodec)
        stored = {name: tensor[: len(rows)] for name, tensor in self._stored.items()}
        self.codec.encode(rows, stored, self.states)
        return sum(tensor.nbytes for tensor in stored.values())

    def decode(self, out: Tensor) -> None:
        """The sample that was encoded last, into ``out``."""
        if isinstance(self.codec, BlockCodec):
            stored = self._memory[: self._size]
            self.codec.decode_sample(stored, self._shared, self._count, bits_of(out, self.states), self.states)
        else:
            assert isinstance(self.codec, RowCodec)
            stored_rows = {name: tensor[: self._count] for name, tensor in self._stored.items()}
            self.codec.decode_into(stored_rows, out, self.states)


def fidelity(cache: FeatureCache, target: Path, samples: int, asked: int, rounds: int) -> list[Fidelity]:
    """Every codec on ``samples`` samples of ``cache``; the target is asked on ``asked`` others of its samples."""
    states = States(cache.manifest.torch_dtype, len(cache.target_layer_ids), cache.hidden_size)
    seen = _rows(cache, CALIBRATION_ROWS)
    tried = np.random.default_rng(0).permutation(len(cache))
    rows = [cache[int(i)].hidden_states[0].clone() for i in tried[:samples]]
    layer_rows = seen.unflatten(1, (states.layers, states.hidden_size))
    divergence = _Divergence(target, [cache[int(i)].input_ids for i in tried[samples : samples + asked]])
    one = States(states.dtype, 1, states.hidden_size)
    found = []
    for name in TRIED:
        sizes = _measured(OneCodec(codec_named(name), states, seen, max(map(len, rows))), rows, rounds)
        kl = []
        for at, layer in enumerate(cache.target_layer_ids):
            trial = OneCodec(codec_named(name), one, layer_rows[:, at].contiguous(), divergence.longest)
            kl.append(divergence.of(layer, _changed_by(trial, states.dtype)))
        found.append(Fidelity(codec=name, kl=kl, **sizes))
        print(found[-1], flush=True)
    return found


def _rows(cache: FeatureCache, count: int) -> Tensor:
    """The first ``count`` rows ``[n, L*H]``."""
    parts: list[Tensor] = []
    for i in range(len(cache)):
        parts.append(cache[i].hidden_states[0])
        if sum(map(len, parts)) >= count:
            break
    return torch.cat(parts)[:count]


def _measured(trial: OneCodec, rows: list[Tensor], rounds: int) -> dict[str, Any]:
    """All of a :class:`Fidelity` but the target's part."""
    states, before = trial.states, sum(sample.nbytes for sample in rows)
    seconds: dict[str, list[float]] = {"encode": [], "decode": []}
    for number in range(rounds):
        spent, size, snr, first = {"encode": 0.0, "decode": 0.0}, 0, [], []
        for sample in rows:
            out = torch.zeros_like(sample)
            begun = time.process_time()
            size += trial.encode(sample)
            between = time.process_time()
            trial.decode(out)
            spent["decode"] += time.process_time() - between
            spent["encode"] += between - begun
            if number == 0:
                by_token = _snr(sample, out, states)
                first.append(by_token[0])
                snr.append(by_token[1:])
        for name, value in spent.items():
            seconds[name].append(value)
        if number == 0:
            of_tokens, of_first, ratio = torch.cat(snr), torch.stack(first), size / before
    speed = {name: before / statistics.median(values) / 1e9 for name, values in seconds.items()}
    return {
        "ratio": ratio,
        "snr_db": of_tokens.median(0).values.tolist(),
        "worst_db": of_tokens.amin(0).tolist(),
        "first_db": of_first.median(0).values.tolist(),
        **speed,
    }


def _snr(rows: Tensor, decoded: Tensor, states: States) -> Tensor:
    """dB ``[n, L]``; 200 where a token is exact."""
    x, y = (t.double().unflatten(1, (states.layers, -1)) for t in (rows, decoded))
    return (10 * torch.log10(x.square().sum(-1) / (x - y).square().sum(-1))).clamp(max=200.0)


def _changed_by(trial: OneCodec, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    def change(states: Tensor) -> Tensor:
        rows = states[0].to(dtype).contiguous()
        out = torch.empty_like(rows)
        trial.encode(rows)
        trial.decode(out)
        return out[None].to(states.dtype)

    return change


class _Divergence:
    """What the target says with a layer's output changed, against what it says."""

    def __init__(self, target: Path, prompts: list[Tensor]):
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
        self._prompts, self.longest = prompts, max(prompt.shape[1] for prompt in prompts)
        self._right = [self._says(prompt) for prompt in prompts]

    @torch.no_grad()
    def _says(self, prompt: Tensor) -> Tensor:
        return self._model(prompt, use_cache=False).logits[0].log_softmax(-1)

    def of(self, layer: int, change: Callable[[Tensor], Tensor]) -> float:
        """Mean KL divergence in nats a token."""

        def hook(module: Any, inputs: Any, output: Any) -> Any:
            return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

        handle = self._model.model.layers[layer].register_forward_hook(hook)
        try:
            said = [(right, self._says(prompt)) for right, prompt in zip(self._right, self._prompts, strict=True)]
            sums = [(right.exp() * (right - now)).sum() for right, now in said]
        finally:
            handle.remove()
        return float(sum(sums)) / sum(map(len, self._right))


def table(found: list[Fidelity], layer_ids: list[int]) -> str:
    """In Markdown."""
    heads = [f"KL at {layer}" for layer in layer_ids]
    lines = [
        " | ".join(["| codec", "ratio", "SNR dB, median", "worst token", "first tokens", *heads, "encode", "decode |"]),
        "| --- " * (7 + len(heads)) + "|",
    ]
    for one in found:
        exact = min(one.snr_db) >= 200
        snr = ["exact"] * 3 if exact else [f"{min(x):.1f}" for x in (one.snr_db, one.worst_db, one.first_db)]
        kl = [f"{value:.5f}" for value in one.kl]
        lines.append(
            " | ".join([f"| {one.codec}", f"{one.ratio:.3f}", *snr, *kl, f"{one.encode:.2f}", f"{one.decode:.2f} |"])
        )
    return "\n".join(lines)


def picture(found: list[Fidelity], layer_ids: list[int]) -> str:
    """SVG: KL (logarithmic) over the ratio, a line a layer."""
    width, height, left, bottom = 640, 400, 70, 50
    coded = [one for one in found if min(one.snr_db) < 200]
    low, high = (math.log10(f(min(o.kl) if f is min else max(o.kl) for o in coded)) for f in (min, max))
    low, high = math.floor(low * 2) / 2, math.ceil(high * 2) / 2
    colours = ("#0b6", "#06c", "#c40", "#83a", "#963", "#555")

    def x(ratio: float) -> float:
        return left + (ratio - 0.2) / 0.35 * (width - left - 20)

    def y(kl: float) -> float:
        return height - bottom - (math.log10(kl) - low) / (high - low) * (height - bottom - 30)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="Arial" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{width / 2}" y="{height - 8}" text-anchor="middle">stored bytes over bytes of bfloat16</text>',
        f'<text x="{left}" y="18">KL, nats a token, with one layer put back</text>',
    ]
    for ratio in (0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5):
        parts.append(f'<path d="M{x(ratio):.0f} 30V{height - bottom}" stroke="#ddd"/>')
        parts.append(f'<text x="{x(ratio):.0f}" y="{height - bottom + 16}" text-anchor="middle">{ratio}</text>')
    for step in range(round(low * 2), round(high * 2) + 1):
        value = 10 ** (step / 2)
        parts.append(f'<path d="M{left} {y(value):.0f}H{width - 20}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y(value) + 4:.0f}" text-anchor="end">{value:.5f}</text>')
    for at, layer in enumerate(layer_ids):
        colour, curve = colours[at % len(colours)], sorted((o.ratio, o.kl[at]) for o in coded if o.codec != "fp8")
        points = " ".join(f"{x(ratio):.1f},{y(kl):.1f}" for ratio, kl in curve)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x(o.ratio):.1f}" cy="{y(o.kl[at]):.1f}" r="4" fill="{colour}"/>' for o in coded]
        parts.append(f'<text x="{width - 120}" y="{50 + 16 * at}" fill="{colour}">layer {layer}</text>')
    for one in coded:
        top = min(y(value) for value in one.kl)
        parts.append(f'<text x="{x(one.ratio) + 6:.0f}" y="{top - 8:.0f}">{one.codec}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def write(found: list[Fidelity], layer_ids: list[int], out: Path) -> None:
    """codecs.json and codecs.svg; prints the table."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "codecs.json").write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n", encoding="utf-8")
    (out / "codecs.svg").write_text(picture(found, layer_ids), encoding="utf-8")
    print(table(found, layer_ids))
