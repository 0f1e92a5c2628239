"""prove_offline.py --target real: drafts for a real language model, from the caches of all codecs and online.

SmolLM2-135M-Instruct (real_target.py), layers 1, 8, 14, 20 and 27 of chats, bfloat16. Measured, and written to
figures.json as it goes:
  states        cache against transformers' output_hidden_states, sample by sample: the largest difference
  equal steps   a draft trained from the cache and one with the target, one sample a batch: losses equal to the last bit
  drafts        for each codec and seed: loss on held-out chats and tokens a pass of the target (acceptance) before and
                after training, the same weights to begin with, samples and anchors. Held-out states are the target's
                own, as they are when a draft is used. zbits gives the same batches as raw, which is looked at, not
                trained.

Acceptance is that of greedy speculative decoding on held-out questions, replayed on the target's own answers
(speculative.py). Every draft is checkpointed, and what is done is found again: stopped at any time, the same command
goes on. One thread of torch: with another job on the machine, two took 4.7 times the processor time. A step takes
0.4 to 0.6 seconds of a core: the default, 200 steps of four drafts, took 8 minutes in all with another job on two
cores; 1,000 steps of three seeds take 80 minutes to 2 hours. Exit code 1 if losses of equal steps, or batches of zbits,
differ in a bit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import draft_checkpoint
import prove_offline
import torch
from dflash_draft import Draft, block_loss, sample_anchors
from real_target import real_target
from safetensors import safe_open
from safetensors.torch import save_file
from speculative import Answer, replay
from train_draft import Trainer, TrainOptions, config_for, new_draft

from cache_format import DFlashTargetBatch, FeatureCache
from extractor.target.hooks import HFDFlashTargetModel

LAYERS = "1,8,14,20,27"
TRAINED = ("raw", "fp8", "quant", "quant:fine")
SAME_BITS = "zbits"
BATCH_SIZE, BLOCKS, EVERY = 4, 8, 20
"""Samples of a step, blocks of each, steps from one checkpoint to the next."""
HELD_OUT_SAMPLES, HELD_OUT_BLOCKS = 48, 4


class RealDrafts:
    """A folder of figures, and what is needed to get those that it lacks."""

    def __init__(self, args: argparse.Namespace):
        """``args``: of prove_offline.py."""
        self.args, self.out = args, args.out
        self.out.mkdir(parents=True, exist_ok=True)
        self._figures_path = self.out / "figures.json"
        found = self._figures_path.exists()
        self.figures: dict[str, Any] = json.loads(self._figures_path.read_text()) if found else {}

    def all(self) -> bool:
        """Every figure that is not there yet; whether what has to be equal is."""
        torch.set_num_threads(1)
        real_target(self.out / "target")
        prove_offline.write_rows(self.out, self.args.rows)
        if "states_largest_difference" not in self.figures:
            self._note("states_largest_difference", self._states_differ())
        if "equal_steps_bit_equal" not in self.figures:
            steps = prove_offline.orders(len(self._single), 1, self.args.equal_steps, self.args.seed)
            curves = prove_offline.both_ways(self._single, self._target, steps, self.args.seed)
            self._note("equal_steps_bit_equal", curves["offline"].loss == curves["online"].loss)
        if "zbits_gives_the_bits_of_raw" not in self.figures:
            raw, coded = self._cache("raw"), self._cache(SAME_BITS)
            same = all(torch.equal(a.hidden_states, b.hidden_states) for a, b in zip(raw, coded, strict=True))
            self._note("zbits_gives_the_bits_of_raw", same)
        for seed in range(self.args.seed, self.args.seed + self.args.seeds):
            for codec in TRAINED:
                name = f"{codec}, seed {seed}, {self.args.steps} steps"
                if name not in self.figures.get("drafts", {}):
                    self._note("drafts", {**self.figures.get("drafts", {}), name: self._trained(codec, seed)})
        print(table(self.figures["drafts"]))
        return bool(self.figures["equal_steps_bit_equal"] and self.figures["zbits_gives_the_bits_of_raw"])

    def _note(self, name: str, value: Any) -> None:
        self.figures[name] = value
        temporary = self._figures_path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.figures, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self._figures_path)
        print(f"{name}: {list(value.items())[-1] if isinstance(value, dict) else value}", flush=True)

    # -- what is measured on -------------------------------------------------------------------------------------------

    def _extracted(self, name: str, data: str, *options: object) -> FeatureCache:
        job = ["--target", self.out / "target", "--data", self.out / data, "--target-layers", LAYERS]
        job += ["--max-length", 192, "--min-loss-tokens", 16, "--dtype", "bfloat16", "--device", "cpu"]
        job += ["--out", self.out / name]
        if not (self.out / name / "index.arrow").exists():
            prove_offline.command(sys.executable, "-m", "extractor", "extract", *job, *options)
        return FeatureCache.open(self.out / name)

    @cached_property
    def _single(self) -> FeatureCache:
        """A few samples, each run by itself."""
        return self._extracted("cache-single", "train.jsonl", "--limit", 24, "--batch-tokens", 1)

    @cached_property
    def _held_out(self) -> FeatureCache:
        return self._extracted("cache-held-out", "held-out.jsonl", "--limit", 64, "--batch-tokens", 1024)

    def _cache(self, codec: str) -> FeatureCache:
        raw = self._extracted("cache-raw", "train.jsonl", "--batch-tokens", 1024)
        if codec == "raw":
            return raw
        to = self.out / f"cache-{codec.replace(':', '-')}"
        if not (to / "index.arrow").exists():
            recode = [sys.executable, "-m", "extractor", "recode", raw.path, to, "--codec", codec]
            prove_offline.command(*recode)
        return FeatureCache.open(to)

    @cached_property
    def _target(self) -> HFDFlashTargetModel:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self.out / "target", dtype=torch.bfloat16)
        return HFDFlashTargetModel(model, list(map(int, LAYERS.split(","))))

    @cached_property
    def _answers(self) -> list[Answer]:
        """Of held-out questions; as far as one pass over all of an answer chooses the same tokens."""
        path = self.out / "answers.safetensors"
        if not path.exists():
            tensors = {}
            for number, prompt in enumerate(prove_offline.held_out_prompts(self.args)):
                answer = answered(self._target, prompt[-128:], self.args.length)
                tensors |= {f"{number}.ids": torch.tensor(answer.ids), f"{number}.states": answer.states}
                tensors[f"{number}.prompt"] = torch.tensor(answer.prompt)
            save_file(tensors, path)
        with safe_open(path, "pt") as file:
            get = file.get_tensor
            count = len(file.keys()) // 3
            return [Answer(get(f"{i}.ids").tolist(), int(get(f"{i}.prompt")), get(f"{i}.states")) for i in range(count)]

    # -- what is measured ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _states_differ(self) -> float:
        """Of the cache from transformers' ``output_hidden_states``, the largest of some samples."""
        model, largest = self._target.model, 0.0
        for sample in (self._single[i] for i in range(min(8, len(self._single)))):
            states = model(sample.input_ids, output_hidden_states=True, use_cache=False).hidden_states
            right = torch.cat([states[layer + 1] for layer in self._single.target_layer_ids], dim=-1)
            largest = max(largest, float((sample.hidden_states.float() - right.float()).abs().max()))
        return largest

    def _trained(self, codec: str, seed: int) -> dict[str, Any]:
        """Train a draft from the cache of ``codec``, going on with a checkpoint if there is one."""
        cache, steps = self._cache(codec), self.args.steps
        config = config_for(self._cache("raw"), num_layers=2, num_heads=None, block_size=8, mask_token_id=None)
        draft = new_draft(config, seed, cache.get_final_norm())
        before = self._judged(draft) if codec == TRAINED[0] else {}
        embed, head = cache.get_input_embeddings(), cache.get_output_embeddings()
        trainer = Trainer(draft, embed, head, TrainOptions(steps=steps, num_blocks=BLOCKS, seed=seed))
        checkpoint = self.out / f"draft-{codec.replace(':', '-')}-{seed}-{steps}.safetensors"
        losses, seconds = draft_checkpoint.restore(trainer, checkpoint)
        begun = time.process_time()
        for batch in batches(cache, steps, seed, len(losses)):
            loss, _ = trainer.step(batch)
            losses.append(float(loss))
            if len(losses) % EVERY == 0 or len(losses) == steps:
                seconds, begun = seconds + time.process_time() - begun, time.process_time()
                draft_checkpoint.save(trainer, losses, seconds, checkpoint)
                recent = statistics.mean(losses[-EVERY:])
                print(f"{codec}, seed {seed}: step {len(losses)}, loss {recent:.3f}, {seconds:.0f} s", flush=True)
        after = self._judged(draft)
        return {
            **{f"{name}_before": value for name, value in before.items()},
            **{f"{name}_after": value for name, value in after.items()},
            "training_loss": statistics.mean(losses[-50:]),
            "processor_seconds": seconds,
        }

    def _judged(self, draft: Draft) -> dict[str, float]:
        """Loss on held-out chats, and tokens a pass of the target on held-out questions."""
        embed, head = self._held_out.get_input_embeddings(), self._held_out.get_output_embeddings()
        passes = sum(replay(answer, draft, embed, head) for answer in self._answers)
        tokens = sum(len(answer.ids) - 1 - answer.prompt for answer in self._answers)
        return {"held_out_loss": held_out_loss(draft, self._held_out), "acceptance": tokens / passes}


def batches(cache: FeatureCache, steps: int, seed: int, done: int) -> Iterator[DFlashTargetBatch]:
    """Those of the steps that are not done."""
    return prove_offline.offline(cache, prove_offline.orders(len(cache), BATCH_SIZE, steps, seed)[done:])


@torch.no_grad()
def held_out_loss(draft: Draft, cache: FeatureCache) -> float:
    """The mean over the first samples, at anchors that are always the same."""
    embed, head, generator = cache.get_input_embeddings(), cache.get_output_embeddings(), torch.Generator()
    generator.manual_seed(0)
    losses = []
    for i in range(min(HELD_OUT_SAMPLES, len(cache))):
        anchors, keep = sample_anchors(cache[i].loss_mask, HELD_OUT_BLOCKS, generator)
        losses.append(float(block_loss(draft, embed, head, cache[i], anchors, keep, TrainOptions.gamma)[0]))
    return statistics.mean(losses)


@torch.no_grad()
def answered(target: HFDFlashTargetModel, prompt: list[int], length: int) -> Answer:
    """What ``target`` says to ``prompt``, ``length`` tokens at the most, and its states."""
    row, mask = torch.tensor([prompt]), torch.ones(1, len(prompt), dtype=torch.int64)
    said = target.model.generate(row, attention_mask=mask, max_new_tokens=length, do_sample=False)
    captured: dict[int, torch.Tensor] = {}
    with target.hooked(captured.__setitem__):
        chosen = target.model(said, use_cache=False).logits[0].argmax(-1)
    ids = said[0].tolist()
    # One token a pass is rounded differently: where that decides, the answer ends.
    differs = (at for at in range(len(prompt), len(ids)) if ids[at] != chosen[at - 1])
    end = next(differs, len(ids))
    states = torch.cat([captured[position] for position in range(len(captured))], dim=-1)[:, :end]
    return Answer(ids[:end], len(prompt), states.contiguous())


def table(drafts: dict[str, dict[str, float]]) -> str:
    """In Markdown: of each codec the mean over the seeds, the least and the largest."""
    lines = ["| codec | seeds | loss, held out | acceptance | training loss |", "| --- | --- | --- | --- | --- |"]
    for codec in TRAINED:
        runs = [run for name, run in drafts.items() if name.startswith(f"{codec},")]
        cells = []
        for figure in ("held_out_loss_after", "acceptance_after", "training_loss"):
            values = [run[figure] for run in runs]
            cells.append(f"{statistics.mean(values):.3f} ({min(values):.3f} - {max(values):.3f})" if values else "-")
        lines.append(" | ".join([f"| {codec}", str(len(runs)), *cells]) + " |")
    return "\n".join(lines)
