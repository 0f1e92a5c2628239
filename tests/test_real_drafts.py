"""scripts/real_drafts.py on a tiny target: an answer replayed is an answer decoded, and what was done goes on."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import commands
import draft_checkpoint
import prove_offline
import pytest
import real_drafts
import torch
from dflash_draft import DraftConfig
from speculative import Answer, decode_with_draft, replay
from torch import nn
from train_draft import Trainer, TrainOptions, new_draft
from transformers import AutoModelForCausalLM

from cache_format import DFlashTargetBatch
from extractor.target.hooks import HFDFlashTargetModel

LAYERS = "0,2,4"


class OftenRight:
    """A draft that guesses every token but some."""

    def __init__(self, ids: list[int], wrong: int):
        self.ids, self.wrong = ids, wrong

    def propose(self, states: torch.Tensor, anchor: int, embed: nn.Module, head: nn.Module) -> torch.Tensor:
        at = range(states.shape[1] + 1, states.shape[1] + 5)
        assert self.ids[at[0] - 1] == anchor
        return torch.tensor([self.ids[i] if i < len(self.ids) and i % self.wrong else 1 for i in at])


@pytest.mark.parametrize("wrong", [1, 2, 3, 5, 100])
def test_a_replay_takes_the_passes_of_the_decoding(tiny_target, wrong):
    model = AutoModelForCausalLM.from_pretrained(tiny_target, dtype=torch.float32)
    target = HFDFlashTargetModel(model, [0, 2, 4], capture_logits=True)
    answer = real_drafts.answered(target, list(range(40, 60)), 14)
    draft = OftenRight(answer.ids, wrong)
    decoded = decode_with_draft(target, draft, None, None, answer.ids[: answer.prompt], len(answer.ids) - answer.prompt)
    assert decoded.tokens == answer.ids[answer.prompt :]
    assert replay(answer, draft, None, None) == decoded.passes
    assert torch.allclose(answer.states, target.generate_batch(*[torch.tensor([answer.ids])] * 3).hidden_states)


def test_an_answer_of_one_token_takes_no_pass():
    assert replay(Answer([3, 4, 5], 2, torch.zeros(1, 3, 8)), OftenRight([3, 4, 5], 2), None, None) == 0


def trainer(steps: int) -> Trainer:
    torch.manual_seed(0)
    embed, head = nn.Embedding(50, 32), nn.Linear(32, 50, bias=False).requires_grad_(False)
    config = DraftConfig(
        hidden_size=32, target_layer_ids=(0, 1), mask_token_id=0, num_layers=1, num_heads=2, block_size=4
    )
    return Trainer(new_draft(config, 0), embed, head, TrainOptions(steps=steps, num_blocks=4))


def test_a_training_that_goes_on_is_the_one_that_was_never_stopped(tmp_path):
    ids, ones = torch.randint(1, 50, (2, 24)), torch.ones(2, 24, dtype=torch.int64)
    batch, whole = DFlashTargetBatch(torch.randn(2, 24, 64), ids, ones, ones), trainer(6)
    right = [float(whole.step(batch)[0]) for _ in range(6)]
    losses: list[float] = []
    for _ in range(3):
        part = trainer(6)
        losses, seconds = draft_checkpoint.restore(part, tmp_path / "draft.safetensors")
        losses += [float(part.step(batch)[0]) for _ in range(2)]
        draft_checkpoint.save(part, losses, seconds + 1, tmp_path / "draft.safetensors")
    assert (losses, seconds) == (right, 2)
    pairs = zip(part.draft.state_dict().values(), whole.draft.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_all_is_measured_once_and_written_down(tiny_target, demo_jsonl, tmp_path, monkeypatch, capsys):
    def rows(out: Path, count: int) -> None:
        for name in ("train.jsonl", "held-out.jsonl"):
            shutil.copy(demo_jsonl, out / name)

    monkeypatch.setattr(real_drafts, "real_target", lambda out: out.exists() or shutil.copytree(tiny_target, out))
    monkeypatch.setattr(prove_offline, "write_rows", rows)
    monkeypatch.setattr(prove_offline, "command", lambda *arguments: commands.made(*arguments[3:]))
    monkeypatch.setattr(real_drafts, "LAYERS", LAYERS)
    monkeypatch.setattr(real_drafts, "HELD_OUT_SAMPLES", 4)
    args = argparse.Namespace(out=tmp_path, rows=0, steps=2, equal_steps=2, prompts=2, length=6, seed=0, seeds=1)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    assert real_drafts.RealDrafts(args).all()
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["equal_steps_bit_equal"]
    assert figures["zbits_gives_the_bits_of_raw"]
    assert figures["states_largest_difference"] < 0.1
    assert [name.split(",")[0] for name in figures["drafts"]] == list(real_drafts.TRAINED)
    assert figures["drafts"]["raw, seed 0, 2 steps"]["held_out_loss_before"] > 0
    told = capsys.readouterr().out.splitlines()[-4:]

    monkeypatch.setattr(real_drafts.RealDrafts, "_note", None)
    real_drafts.RealDrafts(args).all()
    assert capsys.readouterr().out.splitlines()[-4:] == told
