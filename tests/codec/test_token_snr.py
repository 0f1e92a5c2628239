"""The SNR of tokens one by one: a few massive ones do not speak for all others."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from synthetic_cache import write_cache

from cache_format import FeatureCache
from cache_format.codecs.token_snr import BINS, TOKEN_SNR, median_db, token_snr, worst_db
from cache_format.layout.manifest import Manifest
from cache_format.layout.shard_layout import shard_name
from cache_format.layout.shard_reader import ShardFile

LENGTHS = [5, 40, 3, 17, 29, 8, 61, 12, 33, 2] * 3
HIDDEN = 64


def massive_first(_sample_id: int, num_tokens: int) -> torch.Tensor:
    """The first token is 1,000 times as large as the others."""
    rows = torch.randn(num_tokens, 2 * HIDDEN, generator=torch.Generator().manual_seed(_sample_id))
    rows[0] *= 1000
    return rows.to(torch.bfloat16)


def by_hand(original: FeatureCache, lossy: FeatureCache) -> np.ndarray:
    """dB ``[tokens, 2]`` from what both are read to."""
    found = []
    for i in range(len(original)):
        right, read = (c[i].hidden_states[0].double().view(-1, 2, HIDDEN) for c in (original, lossy))
        found.append(10 * torch.log10(right.square().sum(-1) / (right - read).square().sum(-1)))
    return torch.cat(found).numpy()


@pytest.mark.parametrize("codec", ["fp8", "quant"])
def test_median_and_worst_are_those_of_the_tokens_as_they_are_read(tmp_path, cli, codec):
    made = {}
    for name in ("raw", codec):
        path = tmp_path / name
        write_cache(
            path,
            LENGTHS,
            dtype="bfloat16",
            hidden=HIDDEN,
            target_layer_ids=[0, 3],
            shard_bytes=64 << 10,
            states=massive_first,
            codec=name,
        )
        made[name] = FeatureCache.open(path, verify="sample")
    measured, tokens = made[codec].manifest.measured, by_hand(made["raw"], made[codec])
    # Reading rounds once more, to bfloat16.
    assert np.allclose(measured.median_snr_db, np.median(tokens, 0), atol=1.5)
    assert np.allclose(measured.worst_snr_db, tokens.min(0), atol=2.0)
    assert all(worst < median for worst, median in zip(measured.worst_snr_db, measured.median_snr_db, strict=True))
    code, out, _ = cli("inspect", tmp_path / codec)
    assert (code, "SNR, median token" in out, "SNR, worst token" in out) == (0, True, True)
    assert "SNR" not in cli("inspect", tmp_path / "raw")[1]
    with ShardFile(tmp_path / codec / shard_name(0), made[codec].manifest.schema(), 0) as shard:
        assert shard.codec_head[TOKEN_SNR].shape == (2, BINS)
        assert shard.codec_head[TOKEN_SNR].sum() == 2 * shard.num_tokens


def test_recode_counts_as_extract_does(tmp_path, cli):
    for name in ("raw", "fp8"):
        write_cache(
            tmp_path / name,
            LENGTHS,
            dtype="bfloat16",
            hidden=HIDDEN,
            target_layer_ids=[0, 3],
            shard_bytes=64 << 10,
            states=massive_first,
            codec=name,
        )
    assert cli("recode", tmp_path / "raw", tmp_path / "again", "--codec", "fp8")[0] == 0
    assert Manifest.read(tmp_path / "again").measured == Manifest.read(tmp_path / "fp8").measured
    assert not Manifest.read(tmp_path / "raw").token_snr


def test_bins_are_whole_decibels():
    energy = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1e9], dtype=torch.float64)
    error = torch.tensor([0.0999, 0.1, 2.0, 0.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    (counts,) = token_snr(torch.stack([energy, error], 1)[..., None])
    assert {b: n for b, n in enumerate(counts.tolist()) if n} == {10: 2, 0: 2, BINS - 1: 3}
    assert (median_db(counts), worst_db(counts)) == (10.5, 0.0)
    assert token_snr(torch.empty(0, 2, 3, dtype=torch.float64)).sum() == 0
    assert math.isclose(worst_db(np.eye(1, BINS, 34, dtype=np.int32)[0]), 34.0)
