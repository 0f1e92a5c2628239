"""HFDFlashTargetModel: what is captured, from which layers, of which models."""

from __future__ import annotations

import pytest
import torch
from tiny_models import BUILDERS, HIDDEN, LAYERS, VOCAB, OddModel, build, causal, llama, qwen3

from cache_format.errors import InputError
from extractor.target.hooks import HFDFlashTargetModel
from extractor.target.layer_ids import default_target_layer_ids, parse_layer_ids

IDS = [3, 0, 1]


def inputs(rows=2, length=16):
    ids = torch.randint(0, VOCAB - 2, (rows, length), generator=torch.Generator().manual_seed(1))
    return ids, torch.ones_like(ids), torch.ones_like(ids)


@pytest.mark.parametrize("builder", BUILDERS, ids=lambda b: b.__name__)
def test_layer_i_is_hidden_states_i_plus_1(builder):
    model = build(builder)
    ids, mask, loss = inputs()
    with torch.no_grad():
        reference = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    batch = HFDFlashTargetModel(model, IDS).generate_batch(ids, mask, loss)
    expected = torch.cat([reference[i + 1] for i in IDS], dim=-1)
    torch.testing.assert_close(batch.hidden_states, expected, rtol=1e-5, atol=1e-5)
    assert batch.input_ids is ids
    assert batch.attention_mask is mask
    assert batch.loss_mask is loss
    assert batch.logits is None


@pytest.mark.parametrize("builder", [qwen3, llama], ids=lambda b: b.__name__)
def test_the_last_layer_is_captured_before_the_final_norm(builder):
    model = build(builder)
    ids, mask, loss = inputs()
    with torch.no_grad():
        reference = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
        captured = HFDFlashTargetModel(model, [LAYERS - 1]).generate_batch(ids, mask, loss).hidden_states
        assert not torch.allclose(captured, reference, atol=1e-3)
        torch.testing.assert_close(model.model.norm(captured), reference, rtol=1e-5, atol=1e-5)


def test_left_padded_rows_are_what_the_model_gives_for_them():
    model = build(qwen3)
    ids, mask, loss = inputs()
    mask[0, :5] = 0
    with torch.no_grad():
        reference = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[2]
    got = HFDFlashTargetModel(model, [1]).generate_batch(ids, mask, loss).hidden_states
    torch.testing.assert_close(got[mask.bool()], reference[mask.bool()], rtol=1e-5, atol=1e-5)


def test_logits_where_asked_for():
    model = build(qwen3)
    ids, mask, loss = inputs()
    batch = HFDFlashTargetModel(model, [1], capture_logits=True).generate_batch(ids, mask, loss)
    assert batch.logits.shape == (2, 16, VOCAB)


@pytest.mark.parametrize("output", [lambda h: h, lambda h: (h,)], ids=["tensor", "tuple"])
@pytest.mark.parametrize("layers", [None, "dict"])
@pytest.mark.parametrize("wrap", [lambda h: h, lambda h: (h, None)], ids=["tensor_layer", "tuple_layer"])
def test_models_that_are_not_of_transformers(output, layers, wrap):
    model = OddModel(causal, layers=layers, output=output, wrap=wrap)
    target = HFDFlashTargetModel(model, [0, 2], capture_logits=True)
    batch = target.generate_batch(*inputs())
    assert batch.hidden_states.shape == (2, 16, 2 * HIDDEN)
    assert batch.logits.shape == (2, 16, HIDDEN)
    assert len(target._get_transformer_layers()) == 3
    assert target.get_input_embeddings() is model.embed


def test_bad_layer_ids():
    model = build(qwen3)
    with pytest.raises(ValueError, match="at least one"):
        HFDFlashTargetModel(model, [])
    for bad in (-1, LAYERS):
        with pytest.raises(ValueError, match="out of bounds"):
            HFDFlashTargetModel(model, [bad])
    with pytest.raises(ValueError, match="twice"):
        HFDFlashTargetModel(model, [1, 1])


def test_hooks_are_gone_afterwards_even_after_an_error():
    model = build(qwen3)
    target = HFDFlashTargetModel(model, [0, 1])
    target.generate_batch(*inputs())
    with pytest.raises(IndexError):
        target.generate_batch(torch.tensor([[VOCAB + 5]]), torch.ones(1, 1), torch.ones(1, 1))
    assert not any(layer._forward_hooks for layer in model.model.layers)


def test_a_layer_that_does_not_run_is_an_error():
    model = OddModel(causal)
    target = HFDFlashTargetModel(model, [0, 1])
    unused = torch.nn.Linear(1, 1)
    target._get_transformer_layers = lambda: [model.layers[0], unused]
    with pytest.raises(RuntimeError, match="Expected 2 captured layers but got 1"):
        target.generate_batch(*inputs())


def test_the_model_is_put_into_eval_mode():
    model = build(qwen3).train()
    assert not HFDFlashTargetModel(model, [0]).model.training


@pytest.mark.parametrize(
    ("draft", "target", "expected"),
    [(5, 36, [1, 9, 17, 25, 33]), (1, 36, [18]), (2, 36, [1, 33]), (5, 28, [1, 7, 13, 19, 25]), (3, 12, [1, 5, 9])],
)
def test_published_default_layers(draft, target, expected):
    assert default_target_layer_ids(draft, target) == expected


def test_too_few_layers_for_the_default_say_what_to_do():
    with pytest.raises(InputError, match="--num-draft-layers"):
        default_target_layer_ids(5, 6)


def test_layers_on_the_command_line():
    assert parse_layer_ids("1, 9,17") == [1, 9, 17]
    with pytest.raises(InputError, match="--target-layers"):
        parse_layer_ids("1,x")
