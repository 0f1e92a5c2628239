"""The report's figures: states, times and lengths made by hand, whose answers are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cache_format.codecs import States
from cache_format.layout.index import Index
from cache_format.layout.manifest import DataInfo, SourceInfo
from cache_format.layout.samples import BadRows, PartInfo
from extractor.report.browsed_rows import choose_rows
from extractor.report.chosen_samples import MOST_SHARDS, MOST_TOKENS, choose_samples, choose_tokens
from extractor.report.codec_trial import snr, try_codecs
from extractor.report.dropped_rows import DroppedRows, dropped_rows
from extractor.report.findings import codec_findings, state_findings
from extractor.report.job_figures import padding, throughput
from extractor.report.state_figures import SampleStates, StateFigures, Summing, state_figures
from extractor.report.summary import bars

H = 64


def random_states(seed: int, tokens: int = 40, layers: int = 2) -> torch.Tensor:
    """``[n, layers, 64]``, every feature of about the same size, layers unlike each other."""
    return torch.randn(tokens, layers, H, generator=torch.Generator().manual_seed(seed))


def figures(*samples: torch.Tensor) -> StateFigures:
    ids = [10 * (layer + 1) for layer in range(samples[0].shape[1])]
    return state_figures((SampleStates(i, np.arange(len(s)), s) for i, s in enumerate(samples)), ids)


def found(*samples: torch.Tensor, dtype: str = "bfloat16") -> list[str]:
    return [f"{one.level}: {one.text}" for one in state_findings(figures(*samples), dtype)]


# -- states -----------------------------------------------------------------------------------------------------------


def test_random_states_give_nothing_to_say():
    assert found(random_states(0), random_states(1)) == []


def test_norms_and_first_tokens_are_apart():
    states = torch.zeros(5, 1, H)
    states[0, 0, 7] = 1000.0
    states[1:, 0, 3] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    [layer] = figures(states).layers
    assert layer.first_norm == 1000.0
    assert layer.norms[2] == 2.5
    assert (layer.norms[0], layer.norms[4]) == pytest.approx((1.15, 3.85))
    assert (layer.first_channels[0].channel, layer.first_channels[0].share) == (7, 1.0)
    assert (layer.top_channels[0].channel, layer.top_channels[0].share) == (3, 1.0)
    assert layer.top_channels[0].size == pytest.approx(math.sqrt((1 + 4 + 9 + 16) / 4))
    assert layer.largest == 1000.0


def test_a_massive_first_token_is_noted_with_its_channel():
    states = random_states(0)
    states[0, 1, 5] = 4000.0
    [note] = found(states)
    assert note.startswith("note: the first token is massive in layer 20: up to ")
    assert "channel 5" in note


def test_a_constant_layer_is_wrong():
    states = random_states(0)
    states[:, 1] = states[3, 1].clone() * 300
    assert "wrong: layer 20 is constant: every token has the same states, nothing can be learned from it" in found(
        states
    )
    result = figures(states)
    assert [layer.constant for layer in result.layers] == [False, True]
    assert [layer.near_constant for layer in result.layers] == [0.0, 1.0]
    assert result.similarity[0][1] is None
    assert result.similarity[0][0] == pytest.approx(1.0)


def test_near_constant_channels():
    states = random_states(0)
    states[:, 0, :48] = 500.0 + 0.5 * states[:, 0, :48]
    [layer, _] = figures(states).layers
    assert layer.near_constant == 0.75
    assert not layer.constant
    assert any("look: layer 10: 75 % of its channels are near-constant" in text for text in found(states))


def test_identical_layers_are_wrong_and_almost_identical_ones_to_be_looked_at():
    states = random_states(0, layers=3)
    states[:, 2] = states[:, 0]
    assert found(states) == ["wrong: layers 10 and 30 are identical, to the bit"]
    assert figures(states).identical == [(10, 30)]
    other = random_states(1, layers=3)
    other[:, 2] = other[:, 0] * 1.001
    # Identical in one sample alone is not identical.
    assert found(states, other) == ["look: layers 10 and 30 are nearly the same (similarity 1.0000)"]


def test_similarity_takes_the_means_away():
    states = random_states(0, tokens=400)
    states[:, 1] = -2 * states[:, 0]
    states = states + 100.0
    assert figures(states).similarity[0][1] == pytest.approx(-1.0, abs=1e-4)
    unlike = random_states(0, tokens=400) + 100.0
    assert abs(figures(unlike).similarity[0][1]) < 0.05


def test_a_norm_that_grows():
    states = random_states(0)
    states[:, 1] *= torch.linspace(1, 80, 40)[:, None]
    plain = random_states(1)
    growth = figures(plain, states).layers[1].growth
    assert growth.sample_id == 1
    assert 5 < growth.times < 12
    states[:, 1] *= torch.linspace(1, 10, 40)[:, None]
    [text] = found(plain, states)
    assert text.startswith("look: layer 20: the norm grows ")
    assert "(sample 1, first token left out)" in text
    assert figures(random_states(0, tokens=8)).layers[0].growth is None


def test_zeros_and_nan_are_counted_and_leave_the_other_figures_alone():
    states = random_states(0)
    before = figures(states).layers[0]
    spoilt = torch.cat([states, states[:3]])
    spoilt[-1, 0], spoilt[-2, 0, 3], spoilt[-3, 0, 4] = 0.0, torch.nan, torch.inf
    after = figures(spoilt).layers[0]
    assert (after.zero_tokens, after.nonfinite_tokens) == (1, 2)
    assert after.norms[2] == pytest.approx(before.norms[2], rel=0.05)
    assert after.largest == before.largest
    texts = found(spoilt)
    assert "wrong: layer 10: 2 of 43 tokens have NaN or Inf" in texts
    assert "wrong: layer 10: the states of 1 of 43 tokens are all zero" in texts
    assert not any("layer 20" in text for text in texts)


def test_values_near_the_end_of_float16():
    states = random_states(0)
    states[5, 0, 3] = 40000.0
    assert any("float16 ends at 65,504" in text for text in found(states, dtype="float16"))
    assert not any("float16" in text for text in found(states))


def test_places_are_counted_in_ranges_that_double():
    states = torch.ones(10, 1, H) * (torch.arange(10.0)[:, None, None] + 1)
    result = figures(states).positions
    assert result.starts == [0, 1, 2, 4, 8]
    assert result.medians[0] == pytest.approx([8 * x for x in (1, 2, 3.5, 6.5, 9.5)])


def test_what_is_summed_does_not_depend_on_how_it_is_divided():
    states = random_states(0, tokens=60)
    whole, parts = Summing([1, 2], H), Summing([1, 2], H)
    whole.add(SampleStates(0, np.arange(60), states))
    for at in range(0, 60, 20):
        parts.add(SampleStates(0, np.arange(at, at + 20), states[at : at + 20]))
    one, other = whole.figures(), parts.figures()
    for a, b in zip(one.layers, other.layers, strict=True):
        assert (a.norms, a.near_constant) == (b.norms, b.near_constant)
        assert a.channel_sizes == pytest.approx(b.channel_sizes)
    assert np.asarray(one.similarity) == pytest.approx(np.asarray(other.similarity), abs=1e-6)


# -- codecs -----------------------------------------------------------------------------------------------------------


def test_codecs_by_size_and_error():
    rows = random_states(0, tokens=300).flatten(1).to(torch.bfloat16)
    raw, fp8, zbits, quant, fine = try_codecs(rows, States(torch.bfloat16, 2, H))
    assert (raw.codec, raw.ratio, raw.snr_db) == ("raw", 1.0, [])
    assert (fp8.codec, fp8.ratio) == ("fp8", (H + 4) / (2 * H))
    assert 30 < min(fp8.snr_db) <= max(fp8.snr_db) < 36
    assert all(worst <= median for worst, median in zip(fp8.worst_db, fp8.snr_db, strict=True))
    assert (zbits.codec, zbits.snr_db) == ("zbits", [])
    assert 0.6 < zbits.ratio < 0.8
    assert quant.snr_db == pytest.approx([30, 30], abs=0.2)
    assert fine.snr_db == pytest.approx([37, 37], abs=0.2)
    assert quant.ratio < fine.ratio
    assert [*codec_findings([raw, fp8, zbits, quant, fine], [1, 2])] == []


def test_a_token_that_a_codec_spoils_is_not_averaged_away():
    rows = random_states(0, tokens=300).flatten(1)
    rows[7, :H] *= 2.0**-20
    rows[7, 0] = 1.0
    _, fp8, *_ = try_codecs(rows, States(torch.float32, 2, H))
    assert fp8.snr_db[0] > 30
    error = torch.zeros(2, 2 * H)
    assert snr(error, error, 2).isnan().all()
    decoded = rows.clone()
    decoded[3, :H] = 0
    by_token = snr(rows, decoded, 2)
    assert by_token[3, 0] == 0
    assert by_token[4].tolist() == [200.0, 200.0]


# -- samples and rows -------------------------------------------------------------------------------------------------


def index(shards: list[list[int]]) -> Index:
    """Of samples with these lengths, shard by shard in the order of their rows."""
    lengths = np.asarray([n for shard in shards for n in shard], np.int32)
    number = np.repeat(np.arange(len(shards), dtype=np.int32), [len(shard) for shard in shards])
    starts = np.concatenate([np.cumsum([0, *shard[:-1]]) for shard in shards]).astype(np.int64)
    return Index(np.arange(len(lengths)), number, starts, lengths, lengths // 2, np.zeros(len(lengths), np.uint64))


def test_chosen_samples_are_spread_and_the_same_every_time():
    many = index([[100 - i for i in range(50)]] * 200)
    chosen = choose_samples(many, 500)
    assert len(chosen) == len(set(chosen.tolist())) == 500
    assert len(np.unique(many.shard[chosen])) >= MOST_SHARDS - 4
    assert np.array_equal(chosen, choose_samples(many, 500))
    assert 60 < many.num_tokens[chosen].mean() < 90
    assert sorted(choose_samples(many, 10**6).tolist()) == list(range(10_000))
    assert len(choose_samples(many, 3)) == 3


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 1000, 100_000])
def test_chosen_tokens(length):
    places = choose_tokens(length)
    assert (places[0], places[-1]) == (0, length - 1)
    assert (np.diff(places) > 0).all()
    assert len(places) <= MOST_TOKENS
    assert length > 8 or len(places) == length


def test_rows_to_browse_have_the_extremes():
    rng = np.random.default_rng(0)
    tokens = rng.integers(10, 500, 3000)
    learned = (tokens * rng.random(3000)).astype(int)
    rows = choose_rows(tokens, learned, np.arange(0, 3000, 2))
    even = np.arange(0, 3000, 2)
    share = learned / tokens
    for of_all in (tokens, share):
        assert (of_all[rows].min(), of_all[rows].max()) == (of_all[even].min(), of_all[even].max())
    assert rows == sorted(set(rows))
    assert 100 < len(rows) <= 150
    assert all(row % 2 == 0 for row in rows)


def test_examples_of_dropped_rows():
    source = SourceInfo(
        name="x", split=None, weight=1.0, files={"a.jsonl": 0, "b.jsonl": 100}, row_format="text", columns={},
        unused_columns=[], samples=0, tokens=0, loss_tokens=0,
    )  # fmt: skip
    bad = {"is not JSON": BadRows(2, "a.jsonl row 2")}
    data = DataInfo(
        name="x", rows=300, dropped={"too_long": 5, "few_loss_tokens": 1, "bad_row": 2}, bad_rows=bad, sources=[source]
    )
    mixed = PartInfo(0, 100, {"too_long": 1, "few_loss_tokens": 1, "bad_row": 2}), np.arange(4, 100)
    alone = PartInfo(100, 300, {"too_long": 4}), np.delete(np.arange(100, 300), [5, 7, 9, 11])
    long, json, few = dropped_rows(data, [mixed, alone])
    assert long == DroppedRows(
        reason="too_long", rows=5, examples=["b.jsonl row 6", "b.jsonl row 8", "b.jsonl row 10"], certain=True
    )
    assert json == DroppedRows(reason="bad_row: is not JSON", rows=2, examples=["a.jsonl row 2"], certain=True)
    # One of rows 1, 3 and 4: row 2 is known to be bad.
    assert (few.rows, few.certain, few.examples) == (1, False, ["a.jsonl row 1", "a.jsonl row 3", "a.jsonl row 4"])
    assert dropped_rows(DataInfo(name="x", rows=3, dropped={"too_long": 2}), [])[0].examples == []


# -- job --------------------------------------------------------------------------------------------------------------


def test_throughput_and_pauses():
    times = 1000.0 + np.concatenate([np.arange(100), 5000 + np.arange(100)])
    over_time = throughput(times, np.full(200, 500))
    [pause] = over_time.pauses
    assert (pause.after, pause.seconds) == (99.0, 4901.0)
    assert over_time.seconds == 5099.0
    assert over_time.rate == pytest.approx(500 * 199 / (5099 - 4901))
    per_bin = over_time.seconds / len(over_time.rates)
    assert sum(over_time.rates) * per_bin == pytest.approx(500 * 199)
    assert over_time.rates[20] == 0
    assert throughput(times[:3], np.ones(3)) is None
    assert throughput(np.full(50, 7.0), np.ones(50)) is None
    shuffled = np.random.default_rng(0).permutation(200)
    assert throughput(times[shuffled], np.full(200, 500)) == over_time


def test_padding_follows_from_the_lengths():
    assert padding(index([[10, 10, 10], [8, 4]]), 1000) == pytest.approx(1 - 42 / 46)
    assert padding(index([[10, 10, 10], [8, 4]]), 10) == 0
    assert padding(index([[100] * 7] * 300), 500) == 0


def test_bars():
    assert bars([0, 1, 50, 100]) == " ▁▄█"
    assert bars([0, 0]) == "  "
