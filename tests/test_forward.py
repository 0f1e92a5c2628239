"""The extractor's fast path: padded, unmasked, stopped early - and still what each sample gives alone."""

from __future__ import annotations

import pytest
import torch
from tiny_models import BUILDERS, HIDDEN, VOCAB, OddModel, bidirectional, build, careless, causal, qwen3

from cache_format.errors import InputError
from cache_format.layout.captures import Captures
from extractor.target.hooks import HFDFlashTargetModel
from extractor.target.padding import padding_mode
from extractor.target.transformers_backend import MASKED, UNMASKED, TransformersBackend

LENGTHS = [16, 9, 1, 12]


def padded_ids() -> torch.Tensor:
    return torch.randint(0, VOCAB - 2, (4, 16), generator=torch.Generator().manual_seed(1))


def run(target, padding, ids=None, lengths=LENGTHS) -> torch.Tensor:
    out = torch.empty(sum(lengths), len(target.target_layer_ids) * HIDDEN)
    TransformersBackend(target, padding).forward(padded_ids() if ids is None else ids, lengths, out)
    return out


def alone(target) -> torch.Tensor:
    rows = []
    for row, length in zip(padded_ids(), LENGTHS, strict=True):
        ids = row[None, :length]
        rows.append(target.generate_batch(ids, torch.ones_like(ids), torch.ones_like(ids)).hidden_states[0])
    return torch.cat(rows)


@pytest.mark.parametrize("builder", BUILDERS, ids=lambda b: b.__name__)
def test_padded_without_a_mask_gives_what_each_sample_gives_alone(builder):
    target = HFDFlashTargetModel(build(builder), [2, 0, 3])
    assert padding_mode(target, longest=16) == UNMASKED
    expected = alone(target)
    error = (run(target, UNMASKED) - expected).abs().max() / expected.abs().max()
    assert error < 1e-5


def test_an_unpadded_batch_is_bit_equal_to_the_online_one():
    target = HFDFlashTargetModel(build(qwen3), [1, 3])
    ids = padded_ids()
    online = target.generate_batch(ids, torch.ones_like(ids), torch.ones_like(ids)).hidden_states
    assert torch.equal(run(target, UNMASKED, ids, [16] * 4), online.reshape(64, -1))


def test_nothing_runs_after_the_last_captured_layer():
    model = build(qwen3)
    ran = []
    for i, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_args, i=i: ran.append(i))
    model.lm_head.register_forward_hook(lambda *_args: ran.append("head"))
    run(HFDFlashTargetModel(model, [2, 0]), UNMASKED)
    assert ran == [0, 1, 2]


def test_padding_modes_of_models_that_look_to_the_right():
    assert padding_mode(HFDFlashTargetModel(OddModel(causal), [1]), 16) == UNMASKED
    target = HFDFlashTargetModel(OddModel(bidirectional), [0, 2])
    assert padding_mode(target, 16) == MASKED
    torch.testing.assert_close(run(target, MASKED), alone(target), rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="padding"):
        padding_mode(HFDFlashTargetModel(OddModel(careless), [1]), 16)


def test_padding_mode_of_a_one_token_dataset():
    assert padding_mode(HFDFlashTargetModel(build(qwen3), [1]), 1) == UNMASKED


def test_non_finite_states_are_told_by_sample_and_layer():
    target = HFDFlashTargetModel(build(qwen3), [0, 1, 2])
    extractor = TransformersBackend(target, UNMASKED)
    rows = run(target, UNMASKED)
    assert not extractor.nonfinite(rows, LENGTHS).any()
    rows[16 + 8, HIDDEN + 3] = float("nan")
    rows[16 + 9, 2 * HIDDEN] = float("-inf")
    assert extractor.nonfinite(rows, LENGTHS).nonzero().tolist() == [[1, 1], [2, 2]]


def test_nothing_is_kept_for_gradients_and_hooks_are_removed():
    model = build(qwen3)
    rows = run(HFDFlashTargetModel(model, [0]), UNMASKED)
    assert not rows.requires_grad
    assert not model.model.layers[0]._forward_hooks


@pytest.mark.parametrize("builder", BUILDERS, ids=lambda b: b.__name__)
def test_captures_are_the_heads_input_and_the_models_own_logits(builder):
    model = build(builder)
    target = HFDFlashTargetModel(model, [1])
    extractor = TransformersBackend(target, UNMASKED, Captures(last_hidden_states=True, logits_topk=7))
    rows = sum(LENGTHS)
    extra = {
        "last_hidden_states": torch.empty(rows, HIDDEN),
        "logits_topk_values": torch.empty(rows, 7),
        "logits_topk_ids": torch.empty(rows, 7, dtype=torch.int32),
        "logits_logsumexp": torch.empty(rows),
    }
    out = torch.empty(rows, HIDDEN)
    extractor.forward(padded_ids(), LENGTHS, out, extra)
    assert torch.equal(out, run(target, UNMASKED))
    first = 0
    for row, length in zip(padded_ids(), LENGTHS, strict=True):
        with torch.no_grad():
            whole = model(input_ids=row[None, :length], output_hidden_states=True)
        part = slice(first, first + length)
        torch.testing.assert_close(extra["last_hidden_states"][part], whole.hidden_states[-1][0], rtol=1e-4, atol=1e-4)
        top = whole.logits[0].topk(7)
        torch.testing.assert_close(extra["logits_topk_values"][part], top.values, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(extra["logits_logsumexp"][part], whole.logits[0].logsumexp(-1), rtol=1e-4, atol=1e-4)
        got = whole.logits[0].gather(1, extra["logits_topk_ids"][part].long())
        torch.testing.assert_close(got, top.values, rtol=1e-4, atol=1e-4)
        first += length
    assert not extractor.nonfinite(out, LENGTHS, extra).any()
    extra["last_hidden_states"][16, 0] = float("nan")
    (found,) = extractor.nonfinite(out, LENGTHS, extra).nonzero().tolist()
    assert (found[0], extractor.checked[found[1]]) == (1, "last_hidden_states")


def test_last_hidden_states_alone_stop_before_the_head():
    model = build(qwen3)
    ran = []
    model.lm_head.register_forward_hook(lambda *_args: ran.append("head"))
    extractor = TransformersBackend(HFDFlashTargetModel(model, [1]), UNMASKED, Captures(last_hidden_states=True))
    extra = {"last_hidden_states": torch.empty(sum(LENGTHS), HIDDEN)}
    extractor.forward(padded_ids(), LENGTHS, torch.empty(sum(LENGTHS), HIDDEN), extra)
    assert ran == []
    assert not model.lm_head._forward_pre_hooks


def test_captures_that_cannot_be_made_are_refused():
    with pytest.raises(InputError, match="vocabulary"):
        TransformersBackend(HFDFlashTargetModel(build(qwen3), [1]), UNMASKED, Captures(logits_topk=VOCAB + 1))
