"""The cache's embedding and LM head give what the target's own code makes of its own: whatever it multiplies by."""

from __future__ import annotations

import pytest
import torch
from tiny_models import BUILDERS, HIDDEN, LAYERS, VOCAB, OddModel, build, causal, qwen3
from tiny_models import SIZES as MOST_SIZES
from torch import nn
from transformers import (
    AutoTokenizer,
    Cohere2Config,
    Cohere2ForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
)

from cache_format.errors import CacheError
from cache_format.layout.embeddings import load_input_embeddings, load_output_embeddings
from cache_format.layout.manifest import TargetInfo
from extractor.target.factors import Factors, measured_factors, named_factors
from extractor.target.factors_unloaded import factors_around_layers
from extractor.target.hooks import HFDFlashTargetModel
from extractor.target.target_files import write_target_files

SIZES = {**MOST_SIZES, "head_dim": 8, "pad_token_id": 0}
GRANITE = {"embedding_multiplier": 12.0, "logits_scaling": 8.0, "attention_multiplier": 0.3, "residual_multiplier": 0.2}
FACTORS = {"granite": (12.0, 1 / 8), "granite-moe": (12.0, 1 / 16), "cohere": (1.0, 0.0625), "cohere2": (1.0, 0.25)}


def granite() -> nn.Module:
    return GraniteForCausalLM(GraniteConfig(**SIZES, **GRANITE))


def granite_moe() -> nn.Module:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return GraniteMoeForCausalLM(GraniteMoeConfig(**SIZES, **{**GRANITE, "logits_scaling": 16.0}, **experts))


def cohere() -> nn.Module:
    return CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.0625))


def cohere2() -> nn.Module:
    return Cohere2ForCausalLM(Cohere2Config(**SIZES, logit_scale=0.25))


def gemma2() -> nn.Module:
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=30.0))


def seen_in(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a plain forward: the first layer's input, the LM head's input, the logits."""
    seen = {}
    layer = HFDFlashTargetModel(model, [0])._get_transformer_layers()[0]
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, inputs, named: seen.update(first=(*inputs, named.get("hidden_states"))[0]), with_kwargs=True
        ),
        model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: seen.update(final=inputs[0])),
    ]
    with torch.no_grad():
        seen["logits"] = model(input_ids=ids).logits
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "builder", [granite, granite_moe, cohere, cohere2, gemma2, *BUILDERS], ids=lambda builder: builder.__name__
)
def test_the_caches_embeddings_and_head_are_the_targets(builder, dtype, tmp_path, tiny_target):
    model = build(builder).to(dtype)
    (tmp_path / "target").mkdir()
    tied, scale = write_target_files(tmp_path, model, model.config, AutoTokenizer.from_pretrained(tiny_target))
    factors = measured_factors(HFDFlashTargetModel(model, [0]))
    assert not factors.head_problem
    info = TargetInfo(
        name="t",
        model_type="t",
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        vocab_size=VOCAB,
        tie_word_embeddings=tied,
        embed_scale=scale,
        **vars(factors),
    )
    ids = torch.randint(0, VOCAB - 2, (2, 12), generator=torch.Generator().manual_seed(3))
    seen = seen_in(model, ids)
    head = load_output_embeddings(tmp_path, info)
    assert isinstance(head, nn.Linear)
    assert not any(p.requires_grad for p in head.parameters())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(head(seen["final"]).float(), seen["logits"].float(), rtol=tolerance, atol=tolerance)
    if builder.__name__ != "gpt2":  # adds what stands for positions
        assert torch.equal(load_input_embeddings(tmp_path, info)(ids), seen["first"])
    if dtype == torch.float32 and builder.__name__.replace("_", "-") in FACTORS:
        assert (factors.input_scale, factors.logit_scale) == FACTORS[builder.__name__.replace("_", "-")]
        assert named_factors(model.config) == factors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "builder", [granite, granite_moe, cohere, cohere2, gemma2, *BUILDERS], ids=lambda b: b.__name__
)
def test_they_are_found_without_the_layers(builder, dtype):
    model = build(builder).to(dtype)
    found = factors_around_layers(model.config, model, False)
    assert found == measured_factors(HFDFlashTargetModel(model, [0]))


def test_a_target_without_factors_has_none():
    assert measured_factors(HFDFlashTargetModel(build(qwen3), [0])) == Factors()


class OddHead(OddModel):
    """Its logits are no multiple of what its head gives."""

    def __init__(self):
        super().__init__(causal)
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask=None):
        return self.head(super().forward(input_ids, attention_mask)) + torch.arange(VOCAB)


def test_logits_that_do_not_follow_from_the_head_are_told(tmp_path, tiny_target):
    factors = measured_factors(HFDFlashTargetModel(OddHead(), [0]))
    assert "not those of its LM head" in factors.head_problem
    info = TargetInfo(
        name="t",
        model_type="t",
        hidden_size=HIDDEN,
        num_hidden_layers=3,
        vocab_size=VOCAB,
        tie_word_embeddings=False,
        **vars(factors),
    )
    with pytest.raises(CacheError, match="holds no LM head that gives the target's logits"):
        load_output_embeddings(tmp_path, info)


def test_extract_measures_them_and_a_trainer_gets_them(cli, small_job, tiny_target, tmp_path):
    from cache_format import FeatureCache

    torch.manual_seed(0)
    vocab = AutoTokenizer.from_pretrained(tiny_target)
    model = GraniteForCausalLM(GraniteConfig(**{**SIZES, "vocab_size": len(vocab)}, **GRANITE)).eval()
    target, out = tmp_path / "granite", tmp_path / "c"
    model.save_pretrained(target)
    vocab.save_pretrained(target)
    code, _, err = cli(*small_job, "--target", target, "--capture", "last_hidden_states", "--out", out)
    assert code == 0, err
    cache = FeatureCache.open(out)
    sample = cache[0]
    with torch.no_grad():
        logits = model(input_ids=sample.input_ids).logits
    torch.testing.assert_close(cache.get_output_embeddings()(sample.last_hidden_states), logits)
    assert torch.equal(cache.get_input_embeddings()(sample.input_ids), seen_in(model, sample.input_ids)["first"])
