"""The benchmark of codecs runs with each of them, on a small target."""

from __future__ import annotations

import bench_codec
import codec_fidelity
import pytest
import torch

from cache_format import FeatureCache
from cache_format.codecs import CODECS, States


def test_every_codec_is_measured_on_a_target(made, tiny_target, tmp_path, capsys):
    cache = FeatureCache.open(made)
    found = codec_fidelity.fidelity(cache, tiny_target, samples=3, asked=2, rounds=1)
    codec_fidelity.write(found, cache.target_layer_ids, tmp_path)
    assert [one.codec for one in found] == list(codec_fidelity.TRIED)
    by_codec = {one.codec: one for one in found}
    assert by_codec["quant:fine"].kl < by_codec["quant:24dB"].kl
    assert "| quant:fine | " in capsys.readouterr().out
    assert (tmp_path / "codecs.svg").read_text().startswith("<svg")


@pytest.mark.parametrize("codec", CODECS)
def test_a_codec_on_made_up_states_gives_them_back(codec):
    states = States(torch.bfloat16, 2, 64)
    trial = bench_codec.Trial(codec, bench_codec.made_up(200, states, outliers=True), states)
    trial.decode()
    errors = (trial.out.float() - trial.rows.float()).norm() / trial.rows.float().norm()
    assert errors == 0 if trial.codec.lossless else errors < 0.1
