"""Codecs: what is read back, what it may differ by, what it takes on the disk, and that damage is told."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soak_kill
import torch
from hypothesis import given
from hypothesis import strategies as st
from jobs import contents
from safetensors.torch import load_file
from synthetic import HIDDEN, LAYER_IDS, write_cache

from cache_format import CacheError, FeatureCache, InputError, MismatchError
from cache_format.codecs import CODECS, Fp8Codec, RawCodec, States, ZbitsCodec, codec_from_dict
from cache_format.codecs.fp8 import SCALES
from cache_format.codecs.zbits import EXPONENTS
from cache_format.encode import bits_of
from cache_format.integrity import verify
from cache_format.recode import recode

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LENGTHS = [5, 7, 120, 12, 40, 1] * 8


def realistic(tokens: int, states: States, seed: int = 0) -> torch.Tensor:
    """Channels of other scales, some 100-1000 times the rest, and massive activations at the first token."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp(0.5 * torch.randn(states.width, generator=generator))
    scale[torch.randperm(states.width, generator=generator)[: states.width // 100]] *= 300
    rows = torch.randn(tokens, states.width, generator=generator) * scale + 0.5 * scale
    rows[0, ::1000] = 2e4
    return rows.to(states.dtype)


def encoded(codec: ZbitsCodec, rows: torch.Tensor, states: States) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    bits = bits_of(rows, states)
    shared, out = codec.shared(bits, states), np.empty(codec.most_bytes(len(rows), states), np.uint8)
    return out[: codec.encode_sample(bits, shared, out)], shared


def fp8(rows: torch.Tensor, states: States) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    stored = {t.name: torch.empty(t.shape(len(rows)), dtype=DTYPE[t.dtype]) for t in Fp8Codec().tensors(states)}
    return stored, Fp8Codec().encode(rows, stored, states)


DTYPE = {"F8_E4M3": torch.float8_e4m3fn, "F32": torch.float32}


# -- zbits ------------------------------------------------------------------------------------------------------------


@given(
    st.integers(1, 40),
    st.integers(1, 5),
    st.sampled_from([1, 3, 8, 700, 70_000]),
    st.sampled_from(DTYPES),
    st.integers(0, 2**32 - 1),
)
def test_zbits_gives_back_every_bit_of_anything(tokens, layers, hidden, dtype, seed):
    states = States(dtype, layers, hidden if tokens < 6 else min(hidden, 700))
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 256, tokens * states.row_bytes, np.uint8)  # NaN, Inf, subnormals and all
    rows = torch.from_numpy(bits).view(dtype).view(tokens, states.width)
    stored, shared = encoded(ZbitsCodec(), rows, states)
    assert len(stored) <= ZbitsCodec().most_bytes(tokens, states)
    for taken in {tokens, (tokens + 1) // 2, 1}:
        out = np.empty_like(bits_of(rows, states)[:taken])
        ZbitsCodec().decode_sample(stored, shared, tokens, out)
        assert np.array_equal(out, bits_of(rows, states)[:taken])


@pytest.mark.parametrize(("dtype", "at_most"), [(torch.bfloat16, 0.68), (torch.float16, 0.87), (torch.float32, 0.85)])
def test_zbits_makes_realistic_states_smaller(dtype, at_most):
    states = States(dtype, 5, 1024)
    rows = realistic(200, states)
    stored, _ = encoded(ZbitsCodec(), rows, states)
    assert len(stored) <= at_most * rows.nbytes


def test_zbits_never_takes_a_thousandth_more():
    states = States(torch.bfloat16, 5, 1024)
    noise = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (50, states.row_bytes), np.uint8))
    stored, _ = encoded(ZbitsCodec(), noise.view(torch.bfloat16), states)
    assert len(stored) <= 1.001 * noise.nbytes


@pytest.mark.parametrize("dtype", DTYPES)
def test_damaged_zbits_are_refused_or_give_other_values_but_no_crash(dtype):
    states = States(dtype, 2, 300)
    rows = realistic(30, states)
    stored, shared = encoded(ZbitsCodec(), rows, states)
    out, rng = np.empty_like(bits_of(rows, states)), np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        bad = stored.copy()
        bad[rng.integers(0, len(bad) if rng.random() < 0.5 else 40)] ^= 1 << rng.integers(0, 8)
        bad = bad[: rng.integers(0, len(bad))] if rng.random() < 0.2 else bad
        try:
            ZbitsCodec().decode_sample(bad, shared, len(rows), out)
        except ValueError:
            refused += 1
    assert refused > 50


def test_zbits_that_claim_a_terabyte_are_refused_before_it_is_allocated():
    states = States(torch.bfloat16, 1, 64)
    stored, shared = encoded(ZbitsCodec(), realistic(3, states), states)
    frame = b"\x28\xb5\x2f\xfd\xe0" + (1 << 40).to_bytes(8, "little") + b"\x01\x00\x00"
    bad = np.concatenate([np.array([len(frame)], "<u4").view(np.uint8), np.frombuffer(frame, np.uint8), stored[-192:]])
    with pytest.raises(ValueError, match="not of its size"):
        ZbitsCodec().decode_sample(bad, shared, 3, np.empty((3, 64), np.uint16))


# -- fp8 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_keeps_its_documented_bound(dtype):
    states = States(dtype, 5, 256)
    rows = realistic(100, states)
    stored, energy = fp8(rows, states)
    decoded = Fp8Codec().decode(stored, states)
    x, y = (t.double().view(-1, 5, 256) for t in (rows, decoded))
    bound = torch.maximum(x.abs() / 16, stored[SCALES].double()[..., None] / 1024)
    rounding = (x.abs() + bound) * torch.finfo(dtype).eps + 1e-7
    assert ((x - y).abs() <= bound + rounding).all()
    assert torch.allclose(energy[0], x.square().sum((0, 2)), rtol=1e-4)
    assert torch.allclose(energy[1], (x - y).square().sum((0, 2)), rtol=1e-2)
    assert (10 * torch.log10(energy[0] / energy[1]) > 30).all()


@given(st.sampled_from(DTYPES), st.integers(1, 20), st.floats(1e-30, 1e30))
def test_fp8_decodes_to_the_same_bits_on_the_host_as_anywhere(dtype, tokens, scale):
    states = States(dtype, 2, 96)
    rows = (realistic(tokens, States(torch.float32, 2, 96)) * scale).to(dtype).nan_to_num(1.0, 1.0, 1.0)
    stored, _ = fp8(rows, states)
    out = torch.empty_like(rows)
    Fp8Codec().decode_into(stored, out, states)
    assert torch.equal(out, Fp8Codec().decode(stored, states))
    assert out.isfinite().all()


def test_every_e4m3_value_decodes():
    states = States(torch.float32, 1, 256)
    values = torch.arange(256, dtype=torch.uint8).view(1, 256)
    stored = {"hidden_states": values.view(torch.float8_e4m3fn), SCALES: torch.tensor([[1.5]])}
    out = torch.empty(1, 256)
    Fp8Codec().decode_into(stored, out, states)
    finite = (values[0] & 0x7F) != 0x7F  # the two NaN
    assert torch.equal(out[0][finite], stored["hidden_states"].float()[0][finite] * 1.5)


def test_zeros_and_the_smallest_numbers_survive_fp8():
    states = States(torch.float32, 1, 8)
    rows = torch.tensor([[0.0] * 8, [1e-40] * 8, [448.0] * 8])
    stored, _ = fp8(rows, states)
    decoded = Fp8Codec().decode(stored, states)
    assert decoded[0].eq(0).all()
    assert decoded.isfinite().all()
    assert torch.equal(decoded[2], rows[2])


# -- in a cache -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def caches(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    for codec in CODECS:
        write_cache(folder / codec, LENGTHS, dtype=request.param, codec=codec, quarantined=(3,), shard_bytes=64 << 10)
    return {codec: folder / codec for codec in CODECS}


def close(codec: str, original: torch.Tensor, read: torch.Tensor) -> bool:
    if CODECS[codec].lossless:
        return torch.equal(original, read)
    return bool((read - original).float().square().mean().sqrt() < 0.05 * original.float().square().mean().sqrt())


@pytest.mark.parametrize("codec", ["fp8", "zbits"])
def test_every_way_of_reading_gives_the_states(caches, codec):
    raw, cache = (FeatureCache.open(caches[name], verify="sample") for name in ("raw", codec))
    assert len(cache) == len(LENGTHS) - 1
    assert cache.manifest.codec == {"name": codec}
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
        left = cache.gather(rows, allocate=lambda n: torch.empty(n, dtype=torch.uint8), decode=False)
        assert bool(left.encoded) == (codec == "fp8")
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


@pytest.mark.parametrize("codec", ["fp8", "zbits"])
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


def test_a_damaged_block_is_an_error_that_names_the_sample(caches, tmp_path):
    cache = tmp_path / "c"
    shutil.copytree(caches["zbits"], cache)
    opened = FeatureCache.open(cache)
    shard, start, _ = opened._locate(2)
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


def test_unknown_codecs_and_parameters_are_refused_by_name():
    with pytest.raises(ValueError, match="known: raw, fp8, zbits"):
        codec_from_dict({"name": "zip"})
    with pytest.raises(ValueError, match="parameters"):
        codec_from_dict({"name": "zbits", "level": 3})
    assert all(codec_from_dict(codec().to_dict()) == codec() for codec in CODECS.values())
    assert RawCodec().expected_ratio == 1


# -- recode -----------------------------------------------------------------------------------------------------------


def shards_of(cache):
    return {path.name: path.read_bytes() for path in (cache / "shards").iterdir()}


@pytest.mark.parametrize("threads", [1, 3])
def test_recoded_is_what_would_have_been_extracted(caches, tmp_path, threads):
    raw = FeatureCache.open(caches["raw"], verify="sample")
    for codec in ("zbits", "fp8"):
        report = recode(raw, tmp_path / codec, codec, threads=threads)
        assert shards_of(tmp_path / codec) == shards_of(caches[codec])
        assert FeatureCache.open(tmp_path / codec).manifest.fingerprint == (
            FeatureCache.open(caches[codec]).manifest.fingerprint
        )
        assert verify(tmp_path / codec).whole
        assert (report.done_shards, report.shards) == (0, raw.manifest.totals.shards)
        assert report.bytes < report.bytes_before
    back = recode(FeatureCache.open(tmp_path / "zbits", verify="sample"), tmp_path / "back", "raw", threads=threads)
    assert shards_of(tmp_path / "back") == shards_of(caches["raw"])
    assert back.ratio == 1.0


def test_recode_resumes_and_refuses_what_is_not_its_own(caches, tmp_path):
    raw, out = FeatureCache.open(caches["raw"], verify="sample"), tmp_path / "out"
    made = 0

    def stop(_num_bytes):
        nonlocal made
        made += 1
        if made == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recode(raw, out, "zbits", threads=1, progress=stop)
    with pytest.raises(CacheError, match="not complete"):
        FeatureCache.open(out)
    with pytest.raises(MismatchError, match="codec"):
        recode(raw, out, "fp8", threads=1)
    report = recode(raw, out, "zbits", threads=1)
    assert report.done_shards >= 3
    assert shards_of(out) == shards_of(caches["zbits"])
    with pytest.raises(InputError, match="already"):
        recode(raw, tmp_path / "x", "raw", threads=1)
    with pytest.raises(InputError, match="rounded"):
        recode(FeatureCache.open(caches["fp8"]), tmp_path / "x", "zbits", threads=1)
    with pytest.raises(InputError, match="known: raw, fp8, zbits"):
        recode(raw, tmp_path / "x", "zip", threads=1)
    with pytest.raises(InputError, match="beside"):
        recode(raw, caches["raw"] / "in", "zbits", threads=1)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        recode(raw, tmp_path / "other", "zbits", threads=1)


def test_recode_does_not_carry_damage_on(caches, tmp_path):
    cache = tmp_path / "c"
    shutil.copytree(caches["raw"], cache)
    opened = FeatureCache.open(cache, verify="sample")
    shard, start, _ = opened._locate(8)
    offset, _ = shard.file.row_range("hidden_states", start, start + 1)
    with open(shard.file.where, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(CacheError, match="does not match its checksum"):
        recode(opened, tmp_path / "out", "zbits", threads=2)


# -- from the command line --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def extracted(job, tmp_path_factory):
    """The job's caches with both codecs, each made by the command."""
    folder = tmp_path_factory.mktemp("extracted")
    for codec in ("fp8", "zbits"):
        command = [sys.executable, "-m", "extractor", "extract", *job, "--codec", codec, "--out", folder / codec]
        subprocess.run(command, check=True)
    return folder


def test_extract_with_a_codec_gives_the_states_of_raw(made, extracted):
    raw = FeatureCache.open(made)
    for codec in ("fp8", "zbits"):
        cache = FeatureCache.open(extracted / codec, verify="sample")
        assert verify(extracted / codec).whole
        assert cache.manifest.totals == raw.manifest.totals, "the same samples in the same shards"
        for i in range(len(cache)):
            assert close(codec, raw[i].hidden_states, cache[i].hidden_states)
    total = sum(path.stat().st_size for path in (extracted / "zbits/shards").iterdir())
    assert total < 0.87 * sum(path.stat().st_size for path in (made / "shards").iterdir())


def test_recode_makes_the_bytes_that_extract_makes(made, extracted, tmp_path, cli):
    code, out, _ = cli("recode", made, tmp_path / "zbits", "--codec", "zbits", "--json")
    assert code == 0
    assert json.loads(out)["ratio"] < 0.87
    assert contents(tmp_path / "zbits") == contents(extracted / "zbits")
    code, _, err = cli("recode", made, tmp_path / "fp8", "--codec", "fp8")
    assert (code, "SNR by layer" in err) == (0, True)
    ours, theirs = FeatureCache.open(tmp_path / "fp8"), FeatureCache.open(extracted / "fp8")
    assert ours.manifest.fingerprint == theirs.manifest.fingerprint
    for i in range(len(ours)):
        assert torch.equal(ours[i].hidden_states, theirs[i].hidden_states)
    assert cli("recode", made, tmp_path / "zbits", "--codec", "zbits")[0] == 0, "again: nothing to do"
    assert cli("recode", tmp_path, tmp_path / "x", "--codec", "zbits")[0] == 2
    assert cli("recode", made, tmp_path / "x", "--codec", "zip")[0] == 2


@pytest.mark.parametrize("codec", ["fp8", "zbits"])
def test_verify_recompute_knows_what_a_codec_may_change(extracted, codec, tiny_target, cli):
    code, out, err = cli("verify", extracted / codec, "--recompute", 5, "--target", tiny_target, "--json")
    assert code == 0, err
    again = json.loads(out)["recompute"]
    assert again["largest_error"] <= again["tolerance"] < 0.1
    assert (again["largest_error"] > 1e-3) == (codec == "fp8")


def test_inspect_and_estimate_show_codecs(extracted, job, tmp_path, cli):
    _, out, _ = cli("inspect", extracted / "fp8")
    assert "SNR" in out
    assert "dB" in out
    _, out, _ = cli("estimate", *job, "--out", tmp_path, "--codec", "fp8", "--json")
    sizes = json.loads(out)["codec_bytes"]
    assert json.loads(out)["shard_bytes"] == sizes["fp8"]
    assert sizes["fp8"] == sum(path.stat().st_size for path in (extracted / "fp8/shards").iterdir()), "exact"
    assert sizes["fp8"] < sizes["zbits"] < sizes["raw"]
    _, out, _ = cli("estimate", *job, "--out", tmp_path)
    assert all(codec in out for codec in CODECS)


def test_recode_killed_at_random_operations_ends_in_the_same_bytes(made, extracted, tmp_path):
    arguments = ["recode", str(made), str(tmp_path / "c"), "--codec", "zbits"]
    for step in (3, 9, 17, 4, 12):
        if soak_kill.run(arguments, tmp_path / "log", die_at=step) == 0:
            break
    assert soak_kill.run(arguments, tmp_path / "log") == 0
    assert contents(tmp_path / "c") == contents(extracted / "zbits")
