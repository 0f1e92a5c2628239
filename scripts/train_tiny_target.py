"""Train a tiny target on chat data, so that its hidden states mean something.

    python scripts/train_tiny_target.py --out target --data train.jsonl --held-out held.jsonl

Starts from make_tiny_target's random model and minimises plain next-token loss over the rendered conversations, then
says how well it predicts the held-out answers, beside a unigram model. Minutes on two CPU cores; the folder written
is what ``dflash-cache extract --target`` takes.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from make_tiny_target import make_tiny_target
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from extractor.data.conversation import Conversation
from extractor.data.loss_mask import ConversationTokenizer

Encoded = list[tuple[np.ndarray, np.ndarray]]
"""input_ids and loss_mask of each conversation"""


def encode(path: Path, tokenizer: Any) -> Encoded:
    """Every conversation in ``path``, with the mask of its answers."""
    conversation_tokenizer = ConversationTokenizer(tokenizer, assistant_only=True)
    with open(path, encoding="utf-8") as file:
        return [conversation_tokenizer(Conversation(messages=json.loads(line)["messages"])) for line in file]


def windows(encoded: Encoded, length: int, rng: np.random.Generator) -> Tensor:
    """All conversations end to end in random order, cut into ``[n, length]`` int64."""
    flat = np.concatenate([encoded[i][0] for i in rng.permutation(len(encoded))])
    start = rng.integers(0, min(length, len(flat) - length + 1))
    count = (len(flat) - start) // length
    return torch.from_numpy(flat[start : start + count * length].astype(np.int64)).view(count, length)


def train(
    model: torch.nn.Module, encoded: Encoded, *, steps: int, batch_size: int, length: int, lr: float, seed: int
) -> None:
    """AdamW with warm-up and cosine decay over ``steps`` batches of ``[batch_size, length]`` tokens."""
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=max(steps, 2), pct_start=0.05, cycle_momentum=False
    )
    model.train()
    rows = torch.empty(0, length, dtype=torch.int64)
    for step in range(steps):
        while len(rows) < batch_size:
            rows = torch.cat([rows, windows(encoded, length, rng)])
        batch, rows = rows[:batch_size], rows[batch_size:]
        logits = model(input_ids=batch).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == steps - 1:
            print(f"step {step:5}  loss {loss.item():.3f}", flush=True)
    model.eval()


@torch.no_grad()
def evaluate(model: torch.nn.Module, encoded: Encoded, length: int) -> tuple[float, float]:
    """Mean loss (nats) and accuracy of the answers' tokens, each conversation cut to ``length``."""
    losses, right = [], []
    for ids, mask in encoded:
        row = torch.from_numpy(ids[:length].astype(np.int64))
        learned = torch.from_numpy(mask[1:length].astype(bool))
        logits = model(input_ids=row[None]).logits[0, :-1][learned]
        losses.append(F.cross_entropy(logits, row[1:][learned], reduction="none"))
        right.append(logits.argmax(-1) == row[1:][learned])
    return torch.cat(losses).mean().item(), torch.cat(right).float().mean().item()


def evaluate_unigram(training: Encoded, encoded: Encoded, vocab_size: int, length: int) -> tuple[float, float]:
    """The same of a model that knows only how frequent each token is in the training answers."""
    counts = np.ones(vocab_size)
    for ids, mask in training:
        counts += np.bincount(ids[mask.astype(bool)], minlength=vocab_size)
    tokens = np.concatenate([ids[1:length][mask[1:length].astype(bool)] for ids, mask in encoded])
    return float(-np.log(counts[tokens] / counts.sum()).mean()), float((tokens == counts.argmax()).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a tiny target on chat data, on the CPU in minutes.")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--data", type=Path, required=True, help=".jsonl with messages, to train on")
    parser.add_argument("--held-out", type=Path, required=True, help=".jsonl with messages, to evaluate on")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens of a training row; extract no longer samples")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    begun = time.perf_counter()
    make_tiny_target(
        args.out,
        args.data,
        layers=args.layers,
        hidden_size=args.hidden_size,
        vocab_size=args.vocab_size,
        seed=args.seed,
    )
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    model = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32)
    training, held_out = encode(args.data, tokenizer), encode(args.held_out, tokenizer)
    tokens = sum(len(ids) for ids, _ in training)
    size = sum(p.numel() for p in model.parameters())
    print(f"{size:,} parameters, {len(training):,} conversations of {tokens:,} tokens, {args.steps} steps", flush=True)
    train(
        model,
        training,
        steps=args.steps,
        batch_size=args.batch_size,
        length=args.length,
        lr=args.lr,
        seed=args.seed,
    )
    model.save_pretrained(args.out)
    print(
        f"trained in {time.perf_counter() - begun:.0f} s; wrote {args.out}. On {len(held_out)} held-out conversations:"
    )
    for name, (loss, accuracy) in {
        "target": evaluate(model, held_out, args.length),
        "unigram": evaluate_unigram(training, held_out, len(tokenizer), args.length),
    }.items():
        print(f"  {name:8} perplexity {math.exp(loss):8.1f}   accuracy {accuracy:.1%}")


if __name__ == "__main__":
    main()
