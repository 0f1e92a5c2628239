"""quant: what is asked for is met, nothing is clipped, nothing grows, and damage is told."""

from __future__ import annotations

import json

import commands
import numpy as np
import pytest
import soak_kill
import torch
from hypothesis import given
from hypothesis import strategies as st
from jobs import contents

from cache_format import CacheError, FeatureCache
from cache_format.codecs import QuantCodec, States, codec_from_dict, codec_named
from cache_format.layout import manifest as manifest_module
from cache_format.layout.manifest import Manifest
from cache_format.writing.encode import bits_of

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ASKED = ["quant", "quant:fine", "quant:20dB", "quant:45"]


def like_an_llm(tokens: int, states: States, seed: int = 0) -> torch.Tensor:
    """Channels of other scales and means, some that are loud in every token, and a massive first token."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp(0.7 * torch.randn(states.width, generator=generator))
    mean = 0.5 * scale * torch.randn(states.width, generator=generator)
    mean[torch.randperm(states.width, generator=generator)[: states.width // 60]] += 15
    by_token = torch.exp(0.15 * torch.randn(tokens, 1, generator=generator))
    rows = torch.randn(tokens, states.width, generator=generator) * scale * by_token + mean
    rows[0, :: states.hidden_size] = 2e4
    return rows.to(states.dtype)


def encoded(codec: QuantCodec, rows: torch.Tensor, states: States) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of a sample, and its energies."""
    by_token, out = np.zeros((len(rows), 2, states.layers)), np.empty(codec.most_bytes(len(rows), states), np.uint8)
    return out[: codec.encode_sample(bits_of(rows, states), {}, out, states, by_token)], by_token.sum(0)


def decoded(codec: QuantCodec, stored: np.ndarray, rows: torch.Tensor, states: States, first: int) -> torch.Tensor:
    out = torch.empty_like(rows[:first])
    codec.decode_sample(stored, {}, len(rows), bits_of(out, states), states)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("asked", ASKED)
def test_the_median_token_of_each_layer_has_the_snr_asked_for(asked, dtype):
    states = States(dtype, 3, 512)
    rows = like_an_llm(300, states)
    codec = codec_named(asked).calibrated(rows, states)
    stored, energy = encoded(codec, rows, states)
    x, y = (t.double().view(-1, 3, 512) for t in (rows, decoded(codec, stored, rows, states, 300)))
    errors = (x - y).square().sum(-1)
    snr = 10 * torch.log10(x.square().sum(-1) / errors)
    assert (snr[1:].median(0).values - codec.snr_db).abs().max() < 0.3
    assert snr.min() > codec.snr_db - 6
    assert np.allclose(energy[0], x.square().sum((0, 2)), rtol=1e-3)
    # It counts the rounding to steps alone, not that to the stored dtype after it.
    assert np.allclose(energy[1], errors.sum(0), rtol=0.1)
    expected = codec.expected_bytes(300, states)
    assert 0.7 * expected < len(stored) < 1.3 * expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_feature_is_off_by_half_a_step_at_most(dtype):
    """The bound that FORMAT.md states, with steps worked out here from what it says."""
    states = States(dtype, 2, 256)
    rows = like_an_llm(100, states)
    codec = codec_named("quant").calibrated(rows, states)
    stored, _ = encoded(codec, rows, states)
    x, y = (t.double().view(-1, 2, 256) for t in (rows, decoded(codec, stored, rows, states, 100)))
    mean = torch.from_numpy(codec.statistics.means()).double()
    step = (x - mean).abs().mean(-1, keepdim=True) * torch.tensor(codec.statistics.step).double()[:, None]
    rounding = (x.abs() + step) * torch.finfo(dtype).eps + 1e-6
    assert ((x - y).abs() <= 0.503 * step + rounding).all()


def test_torchs_threads_change_no_byte(monkeypatch):
    """It works on fewer rows at a time where torch would start threads."""
    states = States(torch.bfloat16, 3, 700)
    rows = like_an_llm(250, states)
    codec = codec_named("quant").calibrated(rows, states)
    stored, energy = encoded(codec, rows, states)
    back = decoded(codec, stored, rows, states, 250)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    again, same_energy = encoded(codec, rows, states)
    assert np.array_equal(stored, again)
    assert np.array_equal(energy, same_energy)
    assert torch.equal(decoded(codec, stored, rows, states, 250), back)


def test_a_massive_feature_is_not_clipped_but_stored_as_it_is():
    states = States(torch.bfloat16, 1, 256)
    rows = torch.randn(50, 256).to(torch.bfloat16)
    codec = codec_named("quant").calibrated(rows, states)
    rows[7, 3], rows[8, 200], rows[49, 255] = 25_000.0, -1e30, 3e38
    stored, _ = encoded(codec, rows, states)
    back = decoded(codec, stored, rows, states, 50)
    assert torch.equal(back[[7, 8, 49], [3, 200, 255]], rows[[7, 8, 49], [3, 200, 255]])
    assert back.isfinite().all()


@given(st.integers(1, 40), st.integers(1, 4), st.sampled_from([1, 3, 8, 700]), st.sampled_from(DTYPES), st.integers(0))
def test_anything_is_taken_and_nothing_grows(tokens, layers, hidden, dtype, seed):
    """NaN, Inf, subnormals and all: what is not a number stays what it is, what is one stays finite."""
    states = States(dtype, layers, hidden)
    bits = np.random.default_rng(seed).integers(0, 256, tokens * states.row_bytes, np.uint8)
    rows = torch.from_numpy(bits).view(dtype).view(tokens, states.width)
    codec = codec_named("quant").calibrated(rows, states)
    assert codec_from_dict(json.loads(json.dumps(codec.to_dict()))) == codec
    stored, energy = encoded(codec, rows, states)
    assert len(stored) <= codec.most_bytes(tokens, states)
    assert np.isfinite(energy).all()
    for first in {tokens, (tokens + 1) // 2}:
        back = decoded(codec, stored, rows, states, first)
        assert torch.equal(back.isfinite(), rows[:first].isfinite())
        assert torch.equal(back[~back.isfinite()].isnan(), rows[:first][~back.isfinite()].isnan())


def test_states_that_never_change_and_zeros_come_back_to_the_bit():
    states = States(torch.bfloat16, 2, 64)
    rows = torch.full((40, 128), 3.0, dtype=torch.bfloat16)
    for values in (rows, rows * 0):
        codec = codec_named("quant").calibrated(values, states)
        stored, _ = encoded(codec, values, states)
        assert torch.equal(decoded(codec, stored, values, states, 40), values)


def noise(states: States) -> torch.Tensor:
    bits = np.random.default_rng(0).integers(0, 256, (50, states.row_bytes), np.uint8)
    return torch.from_numpy(bits).view(states.dtype)


def many_sizes(states: States) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (10 ** (8 * torch.rand(50, states.width, generator=generator) - 4)).to(states.dtype)


NEVER_SMALLER = {
    "noise": noise,
    "features of many sizes": many_sizes,
    "no numbers": lambda states: torch.full((50, states.width), float("nan"), dtype=states.dtype),
    "Inf and numbers": lambda states: torch.where(many_sizes(states) > 1, float("inf"), noise(states)),
    "subnormal": lambda states: torch.full((50, states.width), 1e-45).to(states.dtype) * many_sizes(states),
    "another layer than it was calibrated for": lambda states: 1e5 * like_an_llm(50, states, seed=1),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seen", ["the same", "others"])
@pytest.mark.parametrize("kind", NEVER_SMALLER)
def test_never_a_thousandth_more_than_before(kind, seen, dtype):
    """Whatever the states are, and whatever those were that the codec was calibrated for."""
    states = States(dtype, 5, 512)
    rows = NEVER_SMALLER[kind](states)
    codec = codec_named("quant").calibrated(rows if seen == "the same" else like_an_llm(50, states), states)
    stored, _ = encoded(codec, rows, states)
    assert len(stored) <= 1.001 * rows.nbytes
    back = decoded(codec, stored, rows, states, 50)
    assert torch.equal(back.isfinite(), rows.isfinite())


@pytest.mark.parametrize("dtype", DTYPES)
def test_damage_is_refused_or_gives_other_values_but_no_crash(dtype):
    states = States(dtype, 2, 300)
    rows = like_an_llm(30, states)
    codec = codec_named("quant").calibrated(rows, states)
    stored, _ = encoded(codec, rows, states)
    rng, refused = np.random.default_rng(0), 0
    for _ in range(300):
        bad = stored.copy()
        bad[rng.integers(0, len(bad) if rng.random() < 0.5 else 100)] ^= 1 << rng.integers(0, 8)
        bad = bad[: rng.integers(0, len(bad))] if rng.random() < 0.2 else bad
        try:
            decoded(codec, bad, rows, states, 30)
        except ValueError:
            refused += 1
    assert refused > 50


def test_statistics_that_are_none_are_refused():
    codec = codec_named("quant").calibrated(like_an_llm(30, States(torch.bfloat16, 2, 8)), States(torch.bfloat16, 2, 8))
    good = codec.to_dict()
    wrong = {"step": [1, "a", -1.0, float("nan")], "mean": [None, "AAA", "AAAA", "!"], "group": ["", "//////////8=", 3]}
    for name, values in wrong.items():
        for value in values:
            bad = {**good, name: [value, 0.2] if name == "step" else value}
            with pytest.raises(ValueError, match="quant"):
                codec_from_dict(bad)
    for bad in (
        {"name": "quant"},
        {**good, "more": 1},
        {"name": "quant", "snr_db": 30},
        {"name": "quant", "snr_db": 5.0},
    ):
        with pytest.raises(ValueError, match=r"quant|SNR"):
            codec_from_dict(bad)


def test_a_manifest_with_other_statistics_is_refused(caches, tmp_path):
    """They are a part of the identity, and of the shape of the states."""
    content = json.loads((caches["quant"] / "manifest.json").read_text())
    content.pop("checksum")
    short = {**content["codec"], "mean": content["codec"]["mean"][:16], "group": content["codec"]["group"][:8]}
    for codec in ({**content["codec"], "step": [0.5] * 3}, short, {"name": "quant", "snr_db": 30.0}):
        bad = {**content, "codec": codec}
        bad["checksum"] = manifest_module._checksum(bad)
        (tmp_path / "manifest.json").write_text(json.dumps(bad))
        with pytest.raises(CacheError, match="codec"):
            Manifest.read(tmp_path)


def test_a_batch_of_some_is_that_of_each(caches):
    cache = FeatureCache.open(caches["quant"])
    together = cache.batch([2, 0, 5])
    for row, i in enumerate((2, 0, 5)):
        alone = cache[i].hidden_states[0]
        assert torch.equal(together.hidden_states[row, : len(alone)], alone)


def test_any_number_of_workers_and_any_kill_give_the_same_bytes(job, extracted, tmp_path):
    whole = contents(extracted / "quant")
    commands.made("extract", *job, "--codec", "quant", "--devices", "cpu,cpu", "--out", tmp_path / "two")
    assert contents(tmp_path / "two") == whole
    arguments = ["extract", *map(str, job), "--codec", "quant", "--out", str(tmp_path / "c")]
    for step in (20, 9, 14):
        if soak_kill.run(arguments, tmp_path / "log", die_at=step) == 0:
            break
    assert soak_kill.run(arguments, tmp_path / "log") == 0
    # It cuts samples/ into other parts.
    shards = {name: data for name, data in contents(tmp_path / "c").items() if name.startswith("shards/")}
    assert shards == {name: data for name, data in whole.items() if name.startswith("shards/")}


def test_a_resume_with_another_quality_is_refused(job, extracted, cli):
    code, _, err = cli("extract", *job, "--codec", "quant:fine", "--out", extracted / "quant")
    assert (code, "37.0" in err, len(err) < 2000) == (2, True, True)
    assert cli("extract", *job, "--codec", "quant", "--out", extracted / "quant")[0] == 0
