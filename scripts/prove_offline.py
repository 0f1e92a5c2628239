"""Is training from the cache the same as training with the target? And does the draft get good at it?

    python scripts/prove_offline.py --out .proof

Makes chat data and trains a tiny target on it, extracts it with the `dflash-cache` command, and trains one draft from
the cache and one on what the target gives online: the same weights to begin with, the same samples, anchors and steps.
Then it measures, and writes figures.json and (where matplotlib is installed) curves.png:
  equal batches   one sample a batch, at extraction and in training: losses have to be equal to the last bit (float32)
  other batches   extracted in length-sorted batches, trained in random ones: the largest relative difference of a loss
  acceptance      tokens a pass of the target in greedy speculative decoding of held-out questions, before and after
                  training; the answers have to be those of plain greedy decoding
  step, memory    median seconds of a training step, offline and online alternating; bytes of the target not loaded
  no target       train_draft.py in a process of its own: no module of transformers or the extractor, none of the
                  target's files opened or mapped
Exit code 1 if a loss of equal batches differs in a bit, the trainer touches the target, or acceptance does not rise
above 1.

    python scripts/prove_offline.py --target real --out .proof-real

does it with a real language model, from PyPI, and a draft for each codec: real_drafts.py says what is measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from make_demo_data import write_demo_data
from speculative import decode_greedily, decode_with_draft
from train_draft import Curve, Trainer, TrainOptions, config_for, new_draft, train

from cache_format import DFlashTargetBatch, FeatureCache
from extractor.target.hooks import HFDFlashTargetModel

HELD_OUT = 200
"""Rows that neither target nor draft are trained on."""

DEFAULTS: dict[str, dict[str, Any]] = {
    "tiny": {"rows": 4000, "steps": 1500, "equal_steps": 300, "prompts": 40},
    "real": {"rows": 600, "steps": 200, "equal_steps": 10, "prompts": 12},
}
"""By target."""


def orders(count: int, batch_size: int, steps: int, seed: int) -> list[np.ndarray]:
    """Sample indices of each step: epochs in random order."""
    rng, rows = np.random.default_rng(seed), np.empty(0, np.int64)
    while len(rows) < steps * batch_size:
        rows = np.concatenate([rows, rng.permutation(count)])
    return list(rows[: steps * batch_size].reshape(steps, batch_size))


def offline(cache: FeatureCache, steps: list[np.ndarray]) -> Iterator[DFlashTargetBatch]:
    """The cache's batches."""
    return (cache.batch(indices) for indices in steps)


def online(cache: FeatureCache, steps: list[np.ndarray], target: HFDFlashTargetModel) -> Iterator[DFlashTargetBatch]:
    """The same tokens, their hidden states from the target as it runs."""
    for batch in offline(cache, steps):
        yield target.generate_batch(batch.input_ids, batch.attention_mask, batch.loss_mask)


def both_ways(cache: FeatureCache, target: HFDFlashTargetModel, steps: list[np.ndarray], seed: int) -> dict[str, Any]:
    """Train from the cache and with the target; the curves, and the draft that was trained from the cache."""
    config = config_for(cache, num_layers=2, num_heads=None, block_size=8, mask_token_id=None)
    embed, head = cache.get_input_embeddings(), cache.get_output_embeddings()
    options = TrainOptions(steps=len(steps), seed=seed)
    curves: dict[str, Any] = {}
    for name, batches in (("offline", offline(cache, steps)), ("online", online(cache, steps, target))):
        print(f"-- {name}", flush=True)
        draft = new_draft(config, seed, cache.get_final_norm())
        curves[name] = train(Trainer(draft, embed, head, options), batches, report_every=100)
        curves.setdefault("draft", draft)
    return curves


def largest_difference(curves: dict[str, Any]) -> float:
    """Of the losses of two curves, as a share of the loss."""
    pairs = zip(curves["offline"].loss, curves["online"].loss, strict=True)
    return max(abs(a - b) / abs(b) if b else float(a != b) for a, b in pairs)


def acceptance(
    target: HFDFlashTargetModel, cache: FeatureCache, draft: Any, prompts: list[list[int]], length: int
) -> tuple[float, int]:
    """Mean tokens a pass over all prompts, and how many answers differ from plain greedy decoding."""
    embed, head = cache.get_input_embeddings(), cache.get_output_embeddings()
    tokens = passes = different = 0
    for prompt in prompts:
        decoded = decode_with_draft(target, draft, embed, head, prompt, length)
        tokens, passes = tokens + length - 1, passes + decoded.passes
        different += decoded.tokens != decode_greedily(target, prompt, length).tokens
    return tokens / passes, different


def step_seconds(
    cache: FeatureCache, target: HFDFlashTargetModel, steps: list[np.ndarray], seed: int
) -> dict[str, float]:
    """Median seconds of a training step, offline and online taking turns."""
    config = config_for(cache, num_layers=2, num_heads=None, block_size=8, mask_token_id=None)
    embed, head = cache.get_input_embeddings(), cache.get_output_embeddings()
    trainer = Trainer(
        new_draft(config, seed, cache.get_final_norm()), embed, head, TrainOptions(steps=2 * len(steps), seed=seed)
    )
    times: dict[str, list[float]] = {"offline": [], "online": []}
    for pair in zip(offline_timed(cache, steps), online_timed(cache, steps, target), strict=True):
        for name, (batch, took) in zip(times, pair, strict=True):
            begun = time.perf_counter()
            trainer.step(batch)
            times[name].append(took + time.perf_counter() - begun)
    return {name: statistics.median(values) for name, values in times.items()}


def offline_timed(cache: FeatureCache, steps: list[np.ndarray]) -> Iterator[tuple[DFlashTargetBatch, float]]:
    """Batches of the cache and the seconds that reading each took."""
    for indices in steps:
        begun = time.perf_counter()
        yield cache.batch(indices), time.perf_counter() - begun


def online_timed(
    cache: FeatureCache, steps: list[np.ndarray], target: HFDFlashTargetModel
) -> Iterator[tuple[DFlashTargetBatch, float]]:
    """Batches of the target and the seconds that each pass took; having the tokens counts as nothing."""
    for batch in offline(cache, steps):
        begun = time.perf_counter()
        states = target.generate_batch(batch.input_ids, batch.attention_mask, batch.loss_mask)
        yield states, time.perf_counter() - begun


def of_the_target(out: Path) -> list[str]:
    """What a trainer process of its own imports or opens that it has no need of; all it may open is the cache."""
    arguments = ["--cache", out / "cache", "--out", out / "watched-draft", "--steps", 20, "--device", "cpu"]
    watch = [sys.executable, Path(__file__).with_name("watch_trainer.py"), *arguments]
    run = subprocess.run([*map(str, watch)], check=True, capture_output=True, text=True)
    seen = json.loads(run.stdout.splitlines()[-1])
    modules = [name for name in seen["modules"] if name.split(".")[0] in ("transformers", "datasets", "extractor")]
    return modules + [name for name in seen["opened"] if name.startswith(str((out / "target").absolute()))]


def plot(curves: dict[str, Curve], path: Path) -> None:
    """Both losses over the steps, smoothed; without matplotlib there is no picture, and it says so."""
    try:
        from matplotlib import pyplot
    except ImportError:
        print("no curves.png: pip install matplotlib")
        return
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name, style in (("online", "-"), ("offline", "--")):
        loss = np.array(curves[name].loss)
        window = max(1, len(loss) // 50)
        axes.plot(np.convolve(loss, np.ones(window) / window, mode="valid"), style, label=name)
    axes.set(xlabel="step", ylabel="loss (nats)", title="A draft trained from the cache and with the target")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def command(*arguments: object) -> None:
    """Run another program of this project, showing what is run."""
    print("$", *arguments, flush=True)
    subprocess.run([str(argument) for argument in arguments], check=True)


def write_rows(out: Path, rows: int) -> tuple[Path, Path]:
    """Chats to train on and chats that are held out, as far as they are not there yet."""
    out.mkdir(parents=True, exist_ok=True)
    train_rows, held_rows = out / "train.jsonl", out / "held-out.jsonl"
    if not held_rows.exists():
        write_demo_data(out / "all.jsonl", rows)
        lines = (out / "all.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        train_rows.write_text("".join(lines[:-HELD_OUT]), encoding="utf-8")
        held_rows.write_text("".join(lines[-HELD_OUT:]), encoding="utf-8")
    return train_rows, held_rows


def prepare_target(args: argparse.Namespace) -> None:
    """Chat data and a target trained on it, as far as they are not there yet."""
    scripts = Path(__file__).parent
    train_rows, held_rows = write_rows(args.out, args.rows)
    if not (args.out / "target" / "model.safetensors").exists():
        options = ["--data", train_rows, "--held-out", held_rows, "--steps", args.target_steps]
        command(sys.executable, scripts / "train_tiny_target.py", "--out", args.out / "target", *options)


def extract(args: argparse.Namespace, name: str, *options: object) -> FeatureCache:
    """The cache of that name, made by the command as far as it is not there yet."""
    job = ["--target", args.out / "target", "--data", args.out / "train.jsonl", "--num-draft-layers", 3]
    job += ["--max-length", 256, "--min-loss-tokens", 16, "--device", "cpu"]
    command(sys.executable, "-m", "extractor", "extract", *job, "--out", args.out / name, *options)
    return FeatureCache.open(args.out / name)


def held_out_prompts(args: argparse.Namespace) -> list[list[int]]:
    """The first questions of held-out conversations, as the target's chat template puts them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.out / "target")
    rows = (args.out / "held-out.jsonl").read_text(encoding="utf-8").splitlines()[: args.prompts]
    prompts = []
    for row in rows:
        messages = json.loads(row)["messages"]
        first = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
        text = tokenizer.apply_chat_template(messages[:first], tokenize=False, add_generation_prompt=True)
        prompts.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    return prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for everything; what is there is used again")
    parser.add_argument("--target", choices=["tiny", "real"], default="tiny", help="real: see real_drafts.py")
    parser.add_argument("--rows", type=int, help="conversations, 200 of them held out; 4,000, of real ones 600")
    parser.add_argument("--target-steps", type=int, default=1200, help="steps that the target is trained")
    parser.add_argument("--steps", type=int, help="steps that a draft is trained: 1,500 batches of 8, or 200 of 4")
    parser.add_argument("--equal-steps", type=int, help="steps of the bit-for-bit run, batches of 1: 300, or 10")
    parser.add_argument("--prompts", type=int, help="held-out questions to decode: 40, or 12")
    parser.add_argument("--length", type=int, default=48, help="tokens of each answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=1, help="with --target real: drafts of each codec")
    args = parser.parse_args()
    given = {name: value for name, value in vars(args).items() if value is not None}
    args = argparse.Namespace(**DEFAULTS[args.target] | given)
    if args.target == "real":
        from real_drafts import RealDrafts

        sys.exit(0 if RealDrafts(args).all() else 1)

    prepare_target(args)
    cache = extract(args, "cache")
    single = extract(args, "cache-of-single-samples", "--batch-tokens", 1)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(args.out / "target", dtype=torch.float32)
    target = HFDFlashTargetModel(model, cache.target_layer_ids, capture_logits=True)
    equal = both_ways(single, target, orders(len(single), 1, args.equal_steps, args.seed), args.seed)
    steps = orders(len(cache), 8, args.steps, args.seed)
    other = both_ways(cache, target, steps, args.seed)
    prompts = held_out_prompts(args)
    config = config_for(cache, num_layers=2, num_heads=None, block_size=8, mask_token_id=None)
    before, _ = acceptance(target, cache, new_draft(config, args.seed, cache.get_final_norm()), prompts, args.length)
    after, different = acceptance(target, cache, other["draft"], prompts, args.length)
    seconds = step_seconds(cache, target, steps[:50], args.seed)
    figures = {
        "equal_batches_bit_equal": equal["offline"].loss == equal["online"].loss,
        "equal_batches_steps": args.equal_steps,
        "other_batches_largest_relative_difference": largest_difference(other),
        "loss_first_and_last_100": [
            statistics.mean(other["offline"].loss[:100]),
            statistics.mean(other["offline"].loss[-100:]),
        ],
        "acceptance_before": before,
        "acceptance_after": after,
        "answers": len(prompts),
        "answers_that_differ_from_greedy": different,
        "step_seconds": seconds,
        "step_speed_up": seconds["online"] / seconds["offline"],
        "target_modules_and_files_in_the_trainer": of_the_target(args.out),
        "target_bytes_not_loaded": sum(p.numel() * p.element_size() for p in model.parameters()),
    }
    curves = {
        name: {way: run[way].loss for way in ("offline", "online")}
        for name, run in (("equal", equal), ("other", other))
    }
    (args.out / "figures.json").write_text(json.dumps({**figures, "curves": curves}, indent=1) + "\n")
    plot({way: other[way] for way in ("offline", "online")}, args.out / "curves.png")
    for name, value in figures.items():
        print(f"{name}: {value}")
    equal_and_alone = figures["equal_batches_bit_equal"] and not figures["target_modules_and_files_in_the_trainer"]
    sys.exit(0 if equal_and_alone and after > 1.0 and after > before else 1)


if __name__ == "__main__":
    main()
