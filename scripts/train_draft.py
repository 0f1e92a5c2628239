"""Train a DFlash draft from a cache: cache_format and torch, no transformers, no target.

    python scripts/train_draft.py --cache cache --out draft --steps 2000

Writes the draft (draft.json, draft.safetensors) and its loss curve (curve.json) to ``--out``. The loop takes any
iterable of ``DFlashTargetBatch``; scripts/prove_offline.py runs the same one on batches straight from the target.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from dflash_draft import Draft, DraftConfig, block_loss, sample_anchors
from torch import Tensor, nn

from cache_format import DFlashCacheError, DFlashTargetBatch, FeatureCache, InputError
from cache_format.layout.samples import part_path, read_part

_OPTIONS = {"num_blocks": "blocks"}


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How a draft is trained; which batches it sees is not part of it."""

    steps: int
    num_blocks: int = 32
    """drawn from each sample at each step"""
    gamma: float = 4.0
    """decay of the loss within a block, in tokens; the paper has 4, 5 and 7 for blocks of 8, 10 and 16"""
    lr: float = 6e-4
    """largest, after the warm-up; the paper's"""
    seed: int = 0
    """of the anchors"""

    def __post_init__(self) -> None:
        for name in ("steps", "num_blocks", "gamma", "lr"):
            if not getattr(self, name) > 0:
                raise InputError(f"--{_OPTIONS.get(name, name)} {getattr(self, name)}: must be above 0")

    def lr_at(self, step: int) -> float:
        """Linear warm-up over the first 4 % of the steps, then a cosine down to 0."""
        warm_up = math.ceil(0.04 * self.steps)
        if step < warm_up:
            return self.lr * (step + 1) / warm_up
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, self.steps - warm_up)))


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What a training run was like, step by step."""

    loss: list[float]
    accuracy: list[float]
    """share of the blocks' tokens that were right"""
    tokens_per_second: float
    """real tokens of the batches, over the whole run"""

    def write(self, path: Path, **more: object) -> None:
        """As JSON; floats are written so that they are read back exactly."""
        path.write_text(json.dumps({**asdict(self), **more}) + "\n", encoding="utf-8")


def new_draft(config: DraftConfig, seed: int, norm: Tensor | None = None) -> Draft:
    """A draft with random weights that depend on the seed alone; its last norm begins as a tenth of the target's,
    ``norm [H]``, if that is known.

    At first the embedding of MASK is most of what comes out, and with tied embeddings the LM head is sure of it. On
    SmolLM2-135M an untrained draft's loss is 10.3 nats so (chance: 10.8), 22 with a norm of ones, 39 with the target's.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        draft = Draft(config)
    if norm is not None:
        draft.norm.weight.data.copy_(0.1 * norm)
    return draft


class Trainer:
    """A draft, its optimizer, and one step after another."""

    def __init__(self, draft: Draft, embed: nn.Module, head: nn.Module, options: TrainOptions):
        """``embed`` and ``head``: the target's, frozen, on the draft's device."""
        self.draft, self.embed, self.head, self.options = draft, embed, head, options
        self.optimizer = torch.optim.AdamW(draft.parameters(), lr=options.lr)
        self.generator = torch.Generator().manual_seed(options.seed)
        self.steps_done = 0

    def step(self, batch: DFlashTargetBatch) -> tuple[Tensor, Tensor]:
        """Learn from one batch; its loss and the share of right tokens, both scalars on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.lr_at(self.steps_done)
        anchors, keep = sample_anchors(batch.loss_mask, self.options.num_blocks, self.generator)
        loss, accuracy = block_loss(self.draft, self.embed, self.head, batch, anchors, keep, self.options.gamma)
        loss.backward()
        nn.utils.clip_grad_norm_(self.draft.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps_done += 1
        return loss.detach(), accuracy


def train(trainer: Trainer, batches: Iterable[DFlashTargetBatch], report_every: int = 50) -> Curve:
    """Train on the first ``options.steps`` of ``batches``, printing the first step, then means of ``report_every``."""
    losses, accuracies, tokens, begun = [], [], 0, time.perf_counter()
    for batch in itertools.islice(batches, trainer.options.steps):
        loss, accuracy = trainer.step(batch)
        losses.append(loss)
        accuracies.append(accuracy)
        tokens += int(batch.attention_mask.sum())
        # The first one too: it says that the run has begun, and how fast.
        if len(losses) == 1 or len(losses) % report_every == 0 or len(losses) == trainer.options.steps:
            recent, right = (torch.stack(x[-report_every:]).mean().item() for x in (losses, accuracies))
            speed = tokens / (time.perf_counter() - begun)
            print(f"step {len(losses):6}  loss {recent:.3f}  accuracy {right:6.1%}  {speed:8,.0f} tokens/s", flush=True)
    return Curve(
        loss=torch.stack(losses).tolist(),
        accuracy=torch.stack(accuracies).tolist(),
        tokens_per_second=tokens / (time.perf_counter() - begun),
    )


def mask_token(cache: FeatureCache, asked: int | None) -> int:
    """``asked``; else the target's padding token or the first special token of its tokenizer that no sample has.

    A padding token is often the one that ends a turn, which the data is full of: the draft would learn that nothing
    follows it but MASK.

    Raises:
        InputError: it occurs in the data, or there is none that does not.
    """
    counts = token_counts(cache)
    if asked is not None:
        if not 0 <= asked < len(counts):
            raise InputError(f"--mask-token-id {asked}: the vocabulary is 0..{len(counts) - 1}")
        if counts[asked]:
            raise InputError(
                f"--mask-token-id {asked}: occurs {counts[asked]:,} times in the data; give one that does not"
            )
        return asked
    config = json.loads((cache.path / "target" / "config.json").read_text(encoding="utf-8"))
    tokenizer = cache.path / "target" / "tokenizer.json"
    added = json.loads(tokenizer.read_text(encoding="utf-8"))["added_tokens"] if tokenizer.exists() else []
    special = sorted(token["id"] for token in added if token["special"])
    for token in (config.get("pad_token_id"), *special):
        if isinstance(token, int) and 0 <= token < len(counts) and not counts[token]:
            return token
    raise InputError("every special token of the target occurs in the data; give a --mask-token-id that does not")


def token_counts(cache: FeatureCache) -> np.ndarray:
    """int64 ``[V]``: how often each token stands in the prepared samples."""
    counts = np.zeros(cache.manifest.target.vocab_size, np.int64)
    assert cache.manifest.totals is not None
    for number in range(cache.manifest.totals.parts):
        batch, _ = read_part(cache.folder.local(part_path(Path("samples"), number).as_posix()))
        ids = np.asarray(batch.column("input_ids").flatten())
        counts += np.bincount(ids, minlength=len(counts))[: len(counts)]
    return counts


def config_for(
    cache: FeatureCache, *, num_layers: int, num_heads: int | None, block_size: int, mask_token_id: int | None
) -> DraftConfig:
    """A draft that fits the cache; by default heads are 64 wide, and MASK is a special token that no sample has.

    Raises:
        InputError: sizes that do not fit, or no token for MASK.
    """
    mask_token_id = mask_token(cache, mask_token_id)
    try:
        return DraftConfig(
            hidden_size=cache.hidden_size,
            target_layer_ids=tuple(cache.target_layer_ids),
            mask_token_id=mask_token_id,
            num_layers=num_layers,
            num_heads=num_heads or max(1, cache.hidden_size // 64),
            block_size=block_size,
        )
    except ValueError as error:
        raise InputError(str(error)) from None


def run(args: argparse.Namespace) -> None:
    """Open the cache, train, write."""
    cache = FeatureCache.open(args.cache)
    config = config_for(
        cache,
        num_layers=args.layers,
        num_heads=args.heads,
        block_size=args.block_size,
        mask_token_id=args.mask_token_id,
    )
    loader = cache.loader(batch_size=args.batch_size, shuffle=True, seed=args.seed, device=args.device)
    options = TrainOptions(
        steps=args.steps or args.epochs * len(loader),
        num_blocks=args.blocks,
        gamma=args.gamma,
        lr=args.lr,
        seed=args.seed,
    )
    draft = new_draft(config, args.seed, cache.get_final_norm()).to(args.device)
    print(f"{cache}\ndraft of {sum(p.numel() for p in draft.parameters()):,} parameters, {options.steps:,} steps")
    embed, head = cache.get_input_embeddings().to(args.device), cache.get_output_embeddings().to(args.device)

    def epochs() -> Iterator[DFlashTargetBatch]:
        for epoch in itertools.count():
            loader.set_epoch(epoch)
            yield from loader

    curve = train(Trainer(draft, embed, head, options), epochs())
    draft.save(args.out)
    curve.write(args.out / "curve.json", options=asdict(options), fingerprint=cache.manifest.fingerprint)
    print(f"wrote {args.out}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a DFlash draft from a cache, without its target.")
    parser.add_argument("--cache", type=Path, required=True, help="the folder that dflash-cache extract wrote")
    parser.add_argument("--out", type=Path, required=True, help="the folder for the draft")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="batches to train on; or:")
    length.add_argument("--epochs", type=int, default=6, help="default 6")
    parser.add_argument("--batch-size", type=int, default=8, help="samples of a step")
    parser.add_argument("--blocks", type=int, default=32, help="blocks drawn from each of them")
    parser.add_argument("--block-size", type=int, default=8, help="tokens of a block, its anchor included")
    parser.add_argument("--layers", type=int, default=2, help="of the draft")
    parser.add_argument("--heads", type=int, help="of the draft; default: 64 wide each")
    parser.add_argument("--lr", type=float, default=TrainOptions.lr)
    parser.add_argument("--gamma", type=float, default=TrainOptions.gamma, help="decay of the loss within a block")
    parser.add_argument("--mask-token-id", type=int, help="default: a special token that the data has not")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and anchors")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    try:
        run(args)
    except DFlashCacheError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
