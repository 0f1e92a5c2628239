"""What does each codec save, cost and change?

    python scripts/bench_codec.py --out .codecs      # keeps the trained target there; a second run uses it again
    python scripts/bench_codec.py --out .codecs --states CACHE --target TARGET     # on a real LLM: codec_fidelity.py

Part 1, one core: torch is held to one thread, and what is counted is processor time, so that other work on the machine
counts little. Median of the rounds, codecs taking turns in each; `copy` is a memcpy of the states, the physical limit:
  ratio      bytes that stand for hidden_states over their bytes before
  encode, decode   GB/s of the states before the codec; decode goes into a batch's memory, as the loader's threads do it
  error      largest and mean |decoded - original|, as a share of the layer's RMS; SNR of the worst and the best layer
States, bfloat16: `trained` of a tiny target trained on chat data (narrow: 128 features a layer, so fp8's scales weigh
32 times what they do in Qwen3-8B); `outliers` made here after what is published of LLMs: channels of log-normal scale,
1 in 200 of them 100-1000 times the rest, two massive activations (1e4) at the first token; `plain` without these two.
Beside the codecs, what else was tried and is not offered: zstd on the bytes as they are; byte planes with zstd at its
level 1; fp8 whose values then go through the entropy coder.

Part 2: a draft trained from the raw cache and from recoded copies, the same seeds and batches: mean loss of the last
100 steps, and acceptance length in greedy speculative decoding of held-out questions, mean and spread over the seeds.
zbits is lossless: its loss curve has to be that of raw to the last bit, so it is trained once.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import zstandard
from codec_fidelity import fidelity, write
from prove_offline import acceptance, extract, held_out_prompts, offline, orders, prepare_target
from train_draft import Trainer, TrainOptions, config_for, new_draft, train

from cache_format import FeatureCache
from cache_format.codecs import CODECS, BlockCodec, RowCodec, States, codec_named
from cache_format.codecs.dtypes import DTYPES
from cache_format.upkeep.recode import recode
from cache_format.writing.encode import bits_of
from extractor.target.hooks import HFDFlashTargetModel

Run = Callable[[], object]


def made_up(tokens: int, states: States, outliers: bool) -> torch.Tensor:
    """Synthetic states ``[tokens, L*H]``; see the top of the file."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    layers = []
    for layer in range(states.layers):
        scale = torch.exp(0.5 * normal(states.hidden_size)) * 0.3 * (layer + 1)
        if outliers:
            chosen = torch.randperm(states.hidden_size, generator=generator)[: states.hidden_size // 200]
            scale[chosen] *= 10 ** (2 + torch.rand(len(chosen), generator=generator))
        by_token = torch.exp(0.2 * normal(tokens, 1))
        rows = normal(tokens, states.hidden_size) * by_token * scale + 0.5 * normal(states.hidden_size) * scale
        if outliers:
            rows[0, torch.randperm(states.hidden_size, generator=generator)[:2]] = 1e4
        layers.append(rows)
    return torch.cat(layers, 1).to(states.dtype)


class Trial:
    """One codec on one set of states: what it stores, and how to run it again."""

    def __init__(self, codec_name: str, rows: torch.Tensor, states: States):
        self.codec, self.rows, self.states = codec_named(codec_name).calibrated(rows, states), rows, states
        self.out = torch.empty_like(rows)
        if isinstance(self.codec, RowCodec):
            tensors = self.codec.tensors(states)
            self.stored = {t.name: torch.empty(t.shape(len(rows)), dtype=DTYPES[t.dtype]) for t in tensors}
            self.encode()
            self.bytes = sum(tensor.nbytes for tensor in self.stored.values())
        else:
            assert isinstance(self.codec, BlockCodec)
            self.bits = bits_of(rows, states)
            self.memory = np.empty(self.codec.most_bytes(len(rows), states), np.uint8)
            self.bytes = int(self.encode())  # type: ignore[call-overload]

    def encode(self) -> object:
        """Encode all rows as one sample."""
        if isinstance(self.codec, RowCodec):
            return self.codec.encode(self.rows, self.stored, self.states)
        assert isinstance(self.codec, BlockCodec)
        self.shared = self.codec.shared(self.bits, self.states)
        energy = np.zeros((len(self.rows), 2, self.states.layers))
        return self.codec.encode_sample(self.bits, self.shared, self.memory, self.states, energy)

    def decode(self) -> None:
        """Decode them into memory that is there."""
        if isinstance(self.codec, RowCodec):
            self.codec.decode_into(self.stored, self.out, self.states)
        else:
            assert isinstance(self.codec, BlockCodec)
            stored = self.memory[: self.bytes]
            self.codec.decode_sample(stored, self.shared, len(self.rows), bits_of(self.out, self.states), self.states)


def seconds(run: Run) -> float:
    begun = time.process_time()
    run()
    return time.process_time() - begun


def measure(name: str, rows: torch.Tensor, states: States, rounds: int) -> None:
    """A table of the codecs on these states."""
    trials = {codec: Trial(codec, rows, states) for codec in CODECS}
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds):
        for codec, trial in trials.items():
            times.setdefault((codec, "encode"), []).append(seconds(trial.encode))
            times.setdefault((codec, "decode"), []).append(seconds(trial.decode))
        times.setdefault(("copy", ""), []).append(seconds(partial(trials["raw"].out.copy_, rows)))
    copy = rows.nbytes / statistics.median(times["copy", ""]) / 1e9
    what = f"{len(rows):,} tokens, {states.layers} x {states.hidden_size}, {rows.nbytes / 1e6:,.0f} MB"
    print(f"\n{name}: {what}; copy {copy:.2f} GB/s")
    print(f"  {'codec':6} {'ratio':>7} {'encode':>8} {'decode':>8}  {'largest':>9} {'mean':>9}  SNR of layers")
    for codec, trial in trials.items():
        speed = [rows.nbytes / statistics.median(times[codec, what]) / 1e9 for what in ("encode", "decode")]
        x, y = (t.float().view(-1, states.layers, states.hidden_size) for t in (rows, trial.out))
        error, rms = (y - x).abs(), x.square().mean((0, 2), keepdim=True).sqrt()
        noise = error.square().sum((0, 2))
        snr = 10 * torch.log10(x.square().sum((0, 2)) / noise)
        told = "exact" if not noise.any() else f"{snr.min():.1f} - {snr.max():.1f} dB"
        share = error / rms
        print(
            f"  {codec:6} {trial.bytes / rows.nbytes:7.3f} {speed[0]:8.2f} {speed[1]:8.2f}  {share.max():9.2g} "
            f"{share.mean():9.2g}  {told}"
        )
    for what, ratio, speed_of in not_offered(rows, states, trials):
        print(f"  not offered: {what}: ratio {ratio:.3f}, entropy decoding alone {speed_of:.2f} GB/s")


def not_offered(rows: torch.Tensor, states: States, trials: dict[str, Trial]) -> list[tuple[str, float, float]]:
    """What else was tried: (what, ratio, GB/s of the states before)."""
    plain = bits_of(rows, states)
    upper, lower = (plain >> 8).astype(np.uint8), (plain & 0xFF).astype(np.uint8)
    values = trials["fp8"].stored["hidden_states"].view(torch.uint8).numpy()
    found = []
    for what, coded, kept in (
        ("zstd level 1 on the bytes as they are", plain.view(np.uint8), 0),
        ("byte planes, zstd level 1 on both", np.concatenate([upper, lower]), 0),
        ("fp8, its values through zstd level 1", values, trials["fp8"].bytes - values.nbytes),
    ):
        parts = np.array_split(coded.reshape(-1), max(1, coded.nbytes >> 17))
        frames = [zstandard.ZstdCompressor(level=1).compress(part.tobytes()) for part in parts]
        took = seconds(partial(list, map(zstandard.ZstdDecompressor().decompress, frames)))
        found.append((what, (sum(map(len, frames)) + kept) / rows.nbytes, rows.nbytes / took / 1e9))
    return found


def trained_states(cache: FeatureCache, tokens: int) -> torch.Tensor:
    """The first ``tokens`` of the cache's states."""
    rows: list[torch.Tensor] = []
    for i in range(len(cache)):
        rows.append(cache[i].hidden_states[0])
        if sum(map(len, rows)) >= tokens:
            break
    return torch.cat(rows)[:tokens]


def train_and_decode(args: argparse.Namespace, caches: dict[str, FeatureCache]) -> None:
    """Part 2."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(args.out / "target", dtype=torch.bfloat16)
    target = HFDFlashTargetModel(model, caches["raw"].target_layer_ids, capture_logits=True)
    prompts = held_out_prompts(args)
    results: dict[str, list[tuple[float, float]]] = {}
    curves: dict[tuple[str, int], list[float]] = {}
    for seed in range(args.seeds):
        for codec, cache in caches.items():
            if codec == "zbits" and seed:
                continue
            print(f"-- {codec}, seed {seed}", flush=True)
            config = config_for(cache, num_layers=2, num_heads=None, block_size=8, mask_token_id=None)
            draft, options = new_draft(config, seed, cache.get_final_norm()), TrainOptions(steps=args.steps, seed=seed)
            embed, head = cache.get_input_embeddings().float(), cache.get_output_embeddings().float()
            batches = offline(cache, orders(len(cache), 8, args.steps, seed))
            curve = train(Trainer(draft, embed, head, options), batches, report_every=args.steps)
            curves[codec, seed] = curve.loss
            length, _ = acceptance(target, cache, draft, prompts, args.length)
            results.setdefault(codec, []).append((statistics.mean(curve.loss[-100:]), length))
    print(f"\n{'codec':6} {'loss, last 100 steps':>24} {'acceptance length':>24}   (mean, and range over the seeds)")
    for codec, runs in results.items():
        cells = []
        for values in zip(*runs, strict=True):
            cells.append(f"{statistics.mean(values):.3f} ({min(values):.3f} - {max(values):.3f})")
        print(f"{codec:6} {cells[0]:>24} {cells[1]:>24}")
    print(f"zbits' loss curve is raw's to the last bit: {curves['zbits', 0] == curves['raw', 0]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the trained target and the caches")
    parser.add_argument("--states", type=Path, help="a raw cache of real states; then this part alone")
    parser.add_argument("--target", type=Path, help="the target that it was extracted from")
    parser.add_argument("--samples", type=int, default=60, help="of that cache, for size, SNR and speed")
    parser.add_argument("--asked", type=int, default=4, help="of that cache, for the KL divergence")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=600, help="of the synthetic states, 5 x 4,096 features each")
    parser.add_argument("--seeds", type=int, default=3, help="drafts trained from each cache; 0: part 1 alone")
    parser.add_argument("--steps", type=int, default=800, help="of each draft's training")
    parser.add_argument("--rows", type=int, default=4000, help="conversations, 200 of them held out")
    parser.add_argument("--target-steps", type=int, default=1200)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--length", type=int, default=48)
    args = parser.parse_args()

    if args.states is not None:
        torch.set_num_threads(1)
        cache = FeatureCache.open(args.states)
        found = fidelity(cache, args.target, args.samples, args.asked, args.rounds)
        write(found, cache.target_layer_ids, args.out)
        return
    prepare_target(args)
    caches = {"raw": extract(args, "cache-raw", "--dtype", "bfloat16")}
    for codec in CODECS:
        if codec != "raw":
            recode(caches["raw"], args.out / f"cache-{codec}", codec, threads=2)
            caches[codec] = FeatureCache.open(args.out / f"cache-{codec}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    narrow = States(torch.bfloat16, len(caches["raw"].target_layer_ids), caches["raw"].hidden_size)
    measure("trained", trained_states(caches["raw"], 30_000), narrow, args.rounds)
    wide = States(torch.bfloat16, 5, 4096)
    for name in ("outliers", "plain"):
        measure(name, made_up(args.tokens, wide, name == "outliers"), wide, args.rounds)
    torch.set_num_threads(threads)
    if args.seeds:
        train_and_decode(args, caches)


if __name__ == "__main__":
    main()
