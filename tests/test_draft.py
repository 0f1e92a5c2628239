"""The draft trainer of scripts/: what a block may see, what its loss counts, and that it needs no target."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import commands
import prove_offline
import pytest
import torch
from dflash_draft import Draft, DraftConfig, block_loss, sample_anchors, visible_to_blocks
from speculative import decode_greedily, decode_with_draft
from synthetic import write_cache
from torch import nn
from train_draft import Trainer, TrainOptions, config_for, new_draft, token_counts, train
from transformers import AutoModelForCausalLM

from cache_format import DFlashTargetBatch, FeatureCache, InputError
from extractor.target.final_norm import final_norm_weight
from extractor.target.hooks import HFDFlashTargetModel

SCRIPTS = Path(prove_offline.__file__).parent
HIDDEN, VOCAB, LENGTH, BLOCK = 32, 50, 24, 4
CONFIG = DraftConfig(
    hidden_size=HIDDEN, target_layer_ids=(0, 1), mask_token_id=0, num_layers=2, num_heads=2, block_size=BLOCK
)


@pytest.fixture
def parts():
    torch.manual_seed(0)
    embed, head = nn.Embedding(VOCAB, HIDDEN), nn.Linear(HIDDEN, VOCAB, bias=False)
    ids = torch.randint(1, VOCAB, (2, LENGTH))
    ones = torch.ones_like(ids)
    batch = DFlashTargetBatch(torch.randn(2, LENGTH, 2 * HIDDEN), ids, ones, ones.clone())
    return new_draft(CONFIG, 0), embed, head, batch


def features(draft: Draft, embed: nn.Module, batch: DFlashTargetBatch, anchors: torch.Tensor) -> torch.Tensor:
    """``[B, N, K, H]`` of blocks at ``anchors``."""
    blocks = torch.zeros(*anchors.shape, BLOCK, dtype=torch.int64)
    blocks[:, :, 0] = batch.input_ids.gather(1, anchors)
    out = draft(batch.hidden_states, embed(blocks.flatten(1)), anchors)
    return out.view(*blocks.shape, -1)


@torch.no_grad()
def test_a_block_sees_states_before_its_anchor_and_nothing_else(parts):
    draft, embed, _, batch = parts
    anchors = torch.tensor([[5, 12], [7, 15]])
    before = features(draft, embed, batch, anchors)
    batch.hidden_states[0, 5:] += 1
    after = features(draft, embed, batch, anchors)
    assert torch.equal(after[0, 0], before[0, 0]), "states from the anchor on are not seen by its block"
    assert not torch.allclose(after[0, 1], before[0, 1]), "but by the block of a later anchor"
    assert torch.equal(after[1], before[1]), "nor by another sample's"


@torch.no_grad()
def test_blocks_do_not_see_each_other(parts):
    draft, embed, _, batch = parts
    together = features(draft, embed, batch, torch.tensor([[5, 12], [7, 15]]))
    batch.input_ids[:, 12] = batch.input_ids[:, 12] % (VOCAB - 1) + 1
    batch.input_ids[:, 15] = batch.input_ids[:, 15] % (VOCAB - 1) + 1
    changed = features(draft, embed, batch, torch.tensor([[5, 12], [7, 15]]))
    assert torch.equal(together[:, 0], changed[:, 0])
    alone = features(draft, embed, batch, torch.tensor([[5], [7]]))
    assert torch.allclose(together[:, :1], alone, atol=1e-5)


def test_visibility_spelled_out():
    visible = visible_to_blocks(torch.tensor([[2, 0]]), 3, 2)[0].int().tolist()
    assert visible == [[1, 1, 0, 1, 1, 0, 0], [1, 1, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 1, 1]]


def test_anchors_are_learned_tokens_that_a_learned_token_follows():
    loss_mask = torch.tensor([[0, 1, 1, 0, 1, 1, 1, 0], [0, 0, 0, 1, 0, 0, 0, 0]])
    for seed in range(20):
        anchors, keep = sample_anchors(loss_mask, 4, torch.Generator().manual_seed(seed))
        assert sorted(anchors[0][keep[0]].tolist()) == [1, 4, 5]
        assert not keep[1].any()


def test_loss_is_the_decayed_mean_of_the_tokens_that_count(parts):
    draft, embed, head, batch = parts
    batch.loss_mask[0, 7:] = 0
    anchors, keep, gamma = torch.tensor([[5], [9]]), torch.tensor([[True], [True]]), 3.0
    loss, right = block_loss(draft, embed, head, batch, anchors, keep, gamma)
    logits = head(features(draft, embed, batch, anchors))
    counted = [(0, 5, 1), (1, 9, 1), (1, 9, 2), (1, 9, 3)]
    terms = [
        (
            math.exp(-(k - 1) / gamma),
            nn.functional.cross_entropy(logits[row, 0, k], batch.input_ids[row, anchor + k]),
            logits[row, 0, k].argmax() == batch.input_ids[row, anchor + k],
        )
        for row, anchor, k in counted
    ]
    expected = sum(w * value for w, value, _ in terms) / sum(w for w, _, _ in terms)
    assert torch.allclose(loss, expected, atol=1e-5)
    assert right == sum(float(hit) for _, _, hit in terms) / 4


def test_a_batch_without_learned_tokens_is_worth_zero(parts):
    draft, embed, head, batch = parts
    batch.loss_mask.zero_()
    anchors, keep = sample_anchors(batch.loss_mask, 2, torch.Generator())
    loss, _ = block_loss(draft, embed, head, batch, anchors, keep, 4.0)
    loss.backward()
    assert loss == 0


def test_a_draft_is_saved_and_loaded(parts, tmp_path):
    draft, embed, head, batch = parts
    draft.save(tmp_path)
    loaded = Draft.load(tmp_path)
    ids = draft.propose(batch.hidden_states[:1], 3, embed, head)
    assert torch.equal(ids, loaded.propose(batch.hidden_states[:1], 3, embed, head))
    assert loaded.config == CONFIG


@pytest.fixture(scope="module")
def single(job, tmp_path_factory) -> FeatureCache:
    """A cache for which every sample went through the target alone."""
    out = tmp_path_factory.mktemp("single") / "cache"
    arguments = [*job, "--limit", "40", "--batch-tokens", "1", "--out", out]
    commands.made("extract", *arguments)
    return FeatureCache.open(out)


@pytest.fixture(scope="module")
def target(single, tiny_target) -> HFDFlashTargetModel:
    model = AutoModelForCausalLM.from_pretrained(tiny_target, dtype=torch.float32)
    return HFDFlashTargetModel(model, single.target_layer_ids, capture_logits=True)


def test_offline_equals_online_to_the_last_bit(single, target):
    steps = prove_offline.orders(len(single), 1, 20, seed=0)
    curves = prove_offline.both_ways(single, target, steps, seed=0)
    assert curves["offline"].loss == curves["online"].loss
    assert curves["offline"].accuracy == curves["online"].accuracy


def test_offline_equals_online_but_for_rounding_in_other_batches(single, target):
    curves = prove_offline.both_ways(single, target, prove_offline.orders(len(single), 4, 15, seed=0), seed=0)
    assert prove_offline.largest_difference(curves) < 1e-4


def test_training_learns(parts):
    draft, embed, head, batch = parts
    trainer = Trainer(draft, embed, head.requires_grad_(False), TrainOptions(steps=150, num_blocks=8, lr=3e-3))
    curve = train(trainer, (batch for _ in range(150)))
    assert sum(curve.loss[-5:]) < 0.5 * sum(curve.loss[:5])


def test_speculative_decoding_gives_the_greedy_answer_in_no_more_passes(single, target):
    config = config_for(single, num_layers=1, num_heads=None, block_size=4, mask_token_id=None)
    embed, head = single.get_input_embeddings(), single.get_output_embeddings()
    prompt = single[0].input_ids[0, :20].tolist()
    greedy = decode_greedily(target, prompt, 12)
    decoded = decode_with_draft(target, new_draft(config, 0), embed, head, prompt, 12)
    assert decoded.tokens == greedy.tokens
    assert decoded.passes <= greedy.passes
    assert greedy.acceptance_length == 1


class Oracle:
    """A draft that is always right."""

    def __init__(self, answer: list[int]):
        self.answer = answer

    def propose(self, states: torch.Tensor, anchor: int, embed: nn.Module, head: nn.Module) -> torch.Tensor:
        done = states.shape[1] - 20 + 1
        return torch.tensor(self.answer[done : done + 3])


def test_a_draft_that_is_always_right_saves_all_it_can(single, target):
    prompt = single[0].input_ids[0, :20].tolist()
    greedy = decode_greedily(target, prompt, 13)
    oracle = Oracle(decode_greedily(target, prompt, 20).tokens)
    decoded = decode_with_draft(target, oracle, None, None, prompt, 13)
    assert decoded.tokens == greedy.tokens
    assert (decoded.passes, decoded.acceptance_length) == (3, 4)


def test_the_trainer_needs_neither_transformers_nor_the_target(single, tiny_target, tmp_path):
    arguments = ["--cache", single.path, "--out", tmp_path / "draft", "--steps", "3", "--batch-size", "4"]
    command = [sys.executable, SCRIPTS / "watch_trainer.py", *arguments]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    seen = json.loads(run.stdout.splitlines()[-1])
    assert not {"transformers", "datasets", "extractor", "extractor.target.hooks"} & set(seen["modules"])
    assert any(name.startswith(str(single.path)) for name in seen["opened"])
    assert not [name for name in seen["opened"] if name.startswith(str(tiny_target))]
    assert (tmp_path / "draft" / "draft.safetensors").is_file()
    assert len(json.loads((tmp_path / "draft" / "curve.json").read_text())["loss"]) == 3


def test_what_cannot_be_trained_on_is_said(tmp_path):
    cache = tmp_path / "cache"
    write_cache(cache, [9, 4])
    command = [sys.executable, SCRIPTS / "train_draft.py", "--out", tmp_path / "draft", "--cache"]
    for path, options, message in (
        (tmp_path / "nowhere", [], "not a feature cache"),
        (cache, ["--mask-token-id", "64"], "--mask-token-id"),
    ):
        run = subprocess.run([*command, path, *options], capture_output=True, text=True)
        assert run.returncode == 1
        assert message in run.stderr
        assert "Traceback" not in run.stderr


def test_mask_is_a_token_that_no_sample_has(single):
    options = {"num_layers": 1, "num_heads": None, "block_size": 4}
    samples = torch.cat([single[i].input_ids[0] for i in range(len(single))])
    counts = token_counts(single)
    assert torch.equal(torch.from_numpy(counts), samples.bincount(minlength=len(counts)))
    assert counts[config_for(single, **options, mask_token_id=None).mask_token_id] == 0
    unused = int((counts == 0).argmax())
    assert config_for(single, **options, mask_token_id=unused).mask_token_id == unused
    with pytest.raises(InputError, match="occurs"):
        config_for(single, **options, mask_token_id=int(counts.argmax()))


def test_a_padding_token_that_the_data_is_full_of_is_not_mask(tmp_path):
    """As SmolLM2's, which ends turns; an unused special token is taken, and without one it says so."""
    write_cache(tmp_path / "c", [50, 40, 60])
    counts = token_counts(FeatureCache.open(tmp_path / "c"))
    used, unused = int(counts.argmax()), int((counts == 0).argmax())
    (tmp_path / "c/target/config.json").write_text(json.dumps({"pad_token_id": used}))
    tokens = [{"id": used, "special": True}, {"id": unused, "special": True}]
    options = {"num_layers": 1, "num_heads": 1, "block_size": 4, "mask_token_id": None}
    for added, found in ((tokens, unused), (tokens[:1], None)):
        (tmp_path / "c/target/tokenizer.json").write_text(json.dumps({"added_tokens": added}))
        cache = FeatureCache.open(tmp_path / "c")
        if found is None:
            with pytest.raises(InputError, match="--mask-token-id"):
                config_for(cache, **options)
        else:
            assert config_for(cache, **options).mask_token_id == found


def test_a_draft_begins_with_the_targets_last_norm(single, target):
    weight = single.get_final_norm()
    assert torch.allclose(weight, target.model.model.norm.weight, rtol=1e-4)
    assert torch.allclose(new_draft(CONFIG, 0, torch.full((HIDDEN,), 2.0)).norm.weight, torch.tensor(0.2))


def test_only_a_norm_that_is_tried_and_found_alike_is_stored():
    class Model(nn.Module):
        def __init__(self, norm: nn.Module):
            super().__init__()
            self.norm = norm

    class Gemma(nn.Module):
        """Multiplies by 1 + w."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.rms_norm(x, (64,)) * (1 + self.weight)

    gemma = Gemma()
    assert torch.allclose(final_norm_weight(Model(gemma)), 1 + gemma.weight, rtol=1e-5)
    assert final_norm_weight(Model(nn.LayerNorm(64))) is None, "it takes a mean off"
    assert final_norm_weight(nn.Linear(4, 4)) is None
