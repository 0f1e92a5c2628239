"""Codecs: what is read back, what it may differ by, what it takes on the disk, and that damage is told."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cache_format.codecs import CODECS, RawCodec, States, ZbitsCodec, codec_from_dict
from cache_format.codecs.fp8 import LARGEST, SCALES, Fp8Codec, _on_device
from cache_format.codecs.interface import total_energy
from cache_format.writing.encode import bits_of

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


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
    return out[: codec.encode_sample(bits, shared, out, states, np.zeros((len(rows), 2, states.layers)))], shared


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
        ZbitsCodec().decode_sample(stored, shared, tokens, out, states)
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
            ZbitsCodec().decode_sample(bad, shared, len(rows), out, states)
        except ValueError:
            refused += 1
    assert refused > 50


def test_zbits_that_claim_a_terabyte_are_refused_before_it_is_allocated():
    states = States(torch.bfloat16, 1, 64)
    stored, shared = encoded(ZbitsCodec(), realistic(3, states), states)
    frame = b"\x28\xb5\x2f\xfd\xe0" + (1 << 40).to_bytes(8, "little") + b"\x01\x00\x00"
    bad = np.concatenate([np.array([len(frame)], "<u4").view(np.uint8), np.frombuffer(frame, np.uint8), stored[-192:]])
    with pytest.raises(ValueError, match="is damaged"):
        ZbitsCodec().decode_sample(bad, shared, 3, np.empty((3, 64), np.uint16), states)


# -- fp8 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_keeps_its_documented_bound(dtype):
    states = States(dtype, 5, 256)
    rows = realistic(100, states)
    stored, by_token = fp8(rows, states)
    energy = total_energy(by_token)
    decoded = Fp8Codec().decode(stored, states)
    x, y = (t.double().view(-1, 5, 256) for t in (rows, decoded))
    bound = torch.maximum(x.abs() / 16, stored[SCALES].double()[..., None] / 1024)
    rounding = (x.abs() + bound) * torch.finfo(dtype).eps + 1e-7
    assert ((x - y).abs() <= bound + rounding).all()
    assert torch.allclose(energy[0], x.square().sum((0, 2)), rtol=1e-4)
    unrounded = stored["hidden_states"].double().view(-1, 5, 256) * stored[SCALES].double()[..., None]
    assert torch.allclose(energy[1], (x - unrounded).square().sum((0, 2)), rtol=1e-4)
    assert (10 * torch.log10(energy[0] / energy[1]) > 30).all()


@given(st.sampled_from(DTYPES), st.integers(1, 30), st.sampled_from([1, 7, 64, 96, 257, 1000]), st.floats(1e-30, 1e30))
def test_fp8_encodes_to_the_same_bits_on_the_host_as_on_a_device(dtype, tokens, hidden, scale):
    """Values, scales and energies; -0.0, ties and steps below the smallest power of two too."""
    states = States(dtype, 2, hidden)
    rows = (realistic(tokens, States(torch.float32, 2, hidden)) * scale).to(dtype).nan_to_num(1.0, 1.0, 1.0)
    steps = torch.arange(-hidden, hidden) / 1024
    rows[0] = torch.where(steps.abs() < 1, steps, LARGEST).to(dtype)
    stored, energy = fp8(rows, states)
    layers = rows.view(tokens, 2, hidden)
    values = torch.empty(layers.shape, dtype=torch.float8_e4m3fn)
    scales, sums = _on_device(layers, values)
    assert torch.equal(stored["hidden_states"].view(torch.int8), values.view(torch.int8).flatten(1))
    assert torch.equal(stored[SCALES], scales)
    expected = sums.double() * (scales.double() * 256).square()
    assert torch.equal(energy, expected.nan_to_num(0, 0, 0).transpose(0, 1))


def test_an_energy_does_not_depend_on_how_tokens_were_batched():
    states = States(torch.bfloat16, 5, 320)
    rows = realistic(100, states)
    whole = total_energy(fp8(rows, states)[1])
    parts = [fp8(rows[start:stop], states)[1] for start, stop in ((0, 1), (1, 40), (40, 100))]
    assert torch.equal(total_energy(torch.cat(parts)), whole)


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


def test_unknown_codecs_and_parameters_are_refused_by_name():
    with pytest.raises(ValueError, match="known: raw, fp8, zbits"):
        codec_from_dict({"name": "zip"})
    with pytest.raises(ValueError, match="parameters"):
        codec_from_dict({"name": "zbits", "level": 3})
    assert all(codec_from_dict(codec().to_dict()) == codec() for codec in CODECS.values())
    assert RawCodec().expected_ratio == 1
