"""Caches with a codec: every way of reading, verify, what the manifest and the commands say."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from codec_caches import LENGTHS, close
from safetensors.torch import load_file
from synthetic import HIDDEN, LAYER_IDS

from cache_format import CacheError, FeatureCache
from cache_format.codecs import CODECS
from cache_format.codecs.fp8 import SCALES
from cache_format.codecs.zbits import EXPONENTS
from cache_format.upkeep.verify import verify


@pytest.mark.parametrize("codec", ["fp8", "zbits", "quant"])
def test_every_way_of_reading_gives_the_states(caches, codec):
    raw, cache = (FeatureCache.open(caches[name], verify="sample") for name in ("raw", codec))
    assert len(cache) == len(LENGTHS) - 1
    assert cache.manifest.codec["name"] == codec
    for i in (0, 2, -1):
        assert cache[i].hidden_states.dtype == raw[i].hidden_states.dtype
        assert close(codec, raw[i].hidden_states, cache[i].hidden_states)
        assert torch.equal(raw[i].input_ids, cache[i].input_ids)
    for options in ({"batch_size": 4}, {"batch_size": 2, "pack_to": 256}, {"batch_size": 3, "max_length": 9}):
        pairs = zip(raw.loader(**options, shuffle=True), cache.loader(**options, shuffle=True), strict=True)
        for theirs, ours in pairs:
            assert close(codec, theirs.hidden_states, ours.hidden_states)
            assert torch.equal(theirs.loss_mask, ours.loss_mask)
            assert ours.hidden_states[ours.attention_mask == 0].eq(0).all()


def test_states_that_stay_encoded_for_the_device_decode_to_the_same_bits(caches):
    """What the loader does with a CUDA device, on the CPU."""
    for codec in CODECS:
        cache = FeatureCache.open(caches[codec])
        rows = [[0], [2], [5]]
        left = cache._source.gather(rows, allocate=lambda n: torch.empty(n, dtype=torch.uint8), decode=False)
        assert bool(left.encoded) == (codec in ("fp8", "quant"))
        on_device = left.to("cpu").decoded()
        assert torch.equal(on_device.hidden_states, cache.batch([0, 2, 5]).hidden_states)
        if codec == "fp8":
            half = cache.manifest.torch_dtype.itemsize
            assert left.batch.hidden_states.nbytes * half == on_device.hidden_states.nbytes


@pytest.mark.parametrize("codec", ["fp8", "zbits"])
def test_plain_safetensors_of_the_documented_tensors(caches, codec):
    tensors = load_file(caches[codec] / "shards/shard-00000.safetensors")
    n, rows, width = len(tensors["sample_ids"]), len(tensors["input_ids"]), HIDDEN * len(LAYER_IDS)
    if codec == "fp8":
        assert (tensors["hidden_states"].shape, tensors["hidden_states"].dtype) == ((rows, width), torch.float8_e4m3fn)
        assert (tensors[SCALES].shape, tensors[SCALES].dtype) == ((rows, len(LAYER_IDS)), torch.float32)
        assert tensors["hidden_states_energy"].shape == (2, len(LAYER_IDS))
    else:
        starts, blocks = tensors["hidden_states_block_starts"], tensors["hidden_states_blocks"]
        assert starts.shape == (n + 1,)
        assert starts[-1] == len(blocks)
        assert tensors[EXPONENTS].shape == (width,)


@pytest.mark.parametrize("codec", ["fp8", "zbits", "quant"])
def test_verify_finds_every_flipped_bit(caches, codec, tmp_path):
    cache = tmp_path / "c"
    shutil.copytree(caches[codec], cache)
    assert verify(cache).whole
    path = cache / "shards/shard-00001.safetensors"
    good, rng = path.read_bytes(), np.random.default_rng(0)
    for at in [*rng.integers(0, len(good), 25).tolist(), len(good) - 1]:
        bad = bytearray(good)
        bad[at] ^= 1 << int(rng.integers(0, 8))
        path.write_bytes(bad)
        assert not verify(cache).whole, at
    path.write_bytes(good)


@pytest.mark.parametrize("codec", ["zbits", "quant"])
def test_a_damaged_block_is_an_error_that_names_the_sample(caches, codec, tmp_path):
    cache = tmp_path / "c"
    shutil.copytree(caches[codec], cache)
    opened = FeatureCache.open(cache)
    shard, start, _ = opened._source.locate(2)
    at, _ = shard.file.block_range(shard.file.position_at(start))
    with open(shard.file.where, "r+b") as file:
        file.seek(at)
        file.write(b"\xff\xff\xff\xff")
    with pytest.raises(CacheError, match="sample 2 cannot be decoded"):
        opened.batch([2])
    with pytest.raises(CacheError, match="does not match its checksum"):
        FeatureCache.open(cache, verify="sample").batch([2])


def test_the_manifest_says_what_the_codec_did(caches):
    measured = {codec: FeatureCache.open(path).manifest.measured for codec, path in caches.items()}
    assert measured["raw"].ratio == 1.0
    assert measured["raw"].snr_db == measured["zbits"].snr_db == []
    assert measured["zbits"].ratio < 0.9
    assert len(measured["fp8"].snr_db) == len(LAYER_IDS)
    assert all(30 < snr < 40 for snr in measured["fp8"].snr_db)
    assert all(29.5 < snr < 31 for snr in measured["quant"].snr_db)
    assert measured["quant"].ratio < measured["fp8"].ratio


def test_extract_with_a_codec_gives_the_states_of_raw(made, extracted):
    raw = FeatureCache.open(made)
    for codec in ("fp8", "zbits", "quant"):
        cache = FeatureCache.open(extracted / codec, verify="sample")
        assert verify(extracted / codec).whole
        assert cache.manifest.totals == raw.manifest.totals, "the same samples in the same shards"
        for i in range(len(cache)):
            assert close(codec, raw[i].hidden_states, cache[i].hidden_states)
    total = sum(path.stat().st_size for path in (extracted / "zbits/shards").iterdir())
    assert total < 0.87 * sum(path.stat().st_size for path in (made / "shards").iterdir())


@pytest.mark.parametrize("codec", ["fp8", "zbits", "quant"])
def test_verify_recompute_knows_what_a_codec_may_change(extracted, codec, tiny_target, cli):
    code, out, err = cli("verify", extracted / codec, "--recompute", 5, "--target", tiny_target, "--json")
    assert code == 0, err
    again = json.loads(out)["recompute"]
    assert again["largest_error"] <= again["tolerance"]["worst"] < 0.15
    assert (again["largest_error"] > 1e-3) == (codec != "zbits")


def test_inspect_and_estimate_show_codecs(extracted, job, tmp_path, cli):
    _, out, _ = cli("inspect", extracted / "fp8")
    assert "SNR" in out
    assert "dB" in out
    _, out, _ = cli("inspect", extracted / "quant")
    assert "30 dB asked" in out
    _, out, _ = cli("inspect", extracted / "quant", "--json")
    assert json.loads(out)["codec"] == {"name": "quant", "snr_db": 30.0}, "not a screen full of statistics"
    _, out, _ = cli("estimate", *job, "--out", tmp_path, "--codec", "fp8", "--json")
    sizes = json.loads(out)["codec_bytes"]
    assert json.loads(out)["shard_bytes"] == sizes["fp8"]
    assert sizes["fp8"] == sum(path.stat().st_size for path in (extracted / "fp8/shards").iterdir()), "exact"
    assert sizes["quant"] < sizes["quant:fine"] < sizes["fp8"] < sizes["zbits"] < sizes["raw"]
    _, out, _ = cli("estimate", *job, "--out", tmp_path)
    assert all(codec in out for codec in CODECS)
