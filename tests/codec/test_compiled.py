"""Compiled loops: the bytes, energies and bits of the passes they stand for; and what happens where they cannot be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import commands
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jobs import contents
from test_codecs import encoded as zbits_encoded
from test_codecs import fp8
from test_quant import decoded as quant_decoded
from test_quant import encoded as quant_encoded
from test_quant import like_an_llm

from cache_format.codecs import States, ZbitsCodec, codec_named, compiled
from cache_format.codecs.fp8 import Fp8Codec
from cache_format.writing.encode import bits_of

ROOT = Path(__file__).resolve().parents[2]


def awkward(tokens: int, states: States, seed: int, kind: str) -> torch.Tensor:
    """States as of a language model, and what is rare in them."""
    rng = np.random.default_rng(seed)
    if kind == "any bits":
        return (
            torch.from_numpy(rng.integers(0, 256, tokens * states.row_bytes, np.uint8))
            .view(torch.bfloat16)
            .view(tokens, states.width)
        )
    rows = like_an_llm(tokens, states, seed)
    if kind == "tiny":
        rows *= 1e-38
    if kind == "huge":
        rows *= 1e33
    if kind == "zeros":
        rows[:, : states.hidden_size] = 0
    if kind == "far":
        rows[torch.from_numpy(rng.random(rows.shape) < 0.05)] *= 1e4
    if kind == "not finite":
        rows[rng.integers(tokens), rng.integers(states.width)] = float(rng.choice([np.nan, np.inf, -np.inf]))
    return rows


KINDS = ["usual", "tiny", "huge", "zeros", "far", "not finite", "any bits"]
ANYTHING = given(
    st.integers(1, 300),
    st.sampled_from([1, 3]),
    st.sampled_from([1, 7, 16, 100, 576]),
    st.sampled_from(KINDS),
    st.integers(0, 2**32 - 1),
)


@pytest.fixture(scope="module")
def without():
    """A way to run something by the passes of numpy and torch."""

    def run(function):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compiled, "compiled_loops", lambda: None)
            return function()

    return run


def test_they_are_used_where_numba_is_installed():
    assert compiled.loops_for(torch.bfloat16) is not None
    assert compiled.loops_for(torch.float16) is None
    assert compiled.loops_for(torch.float32) is None


@ANYTHING
def test_zbits_has_the_same_bytes(without, tokens, layers, hidden, kind, seed):
    states = States(torch.bfloat16, layers, hidden)
    rows = awkward(tokens, states, seed, kind)
    stored, shared = zbits_encoded(ZbitsCodec(), rows, states)
    assert np.array_equal(stored, without(lambda: zbits_encoded(ZbitsCodec(), rows, states))[0])
    for taken in {tokens, (tokens + 1) // 2}:
        out = np.empty_like(bits_of(rows, states)[:taken])
        ZbitsCodec().decode_sample(stored, shared, tokens, out, states)
        assert np.array_equal(out, bits_of(rows, states)[:taken])


@ANYTHING
def test_fp8_has_the_same_bytes_energies_and_bits(without, tokens, layers, hidden, kind, seed):
    states = States(torch.bfloat16, layers, hidden)
    rows = awkward(tokens, states, seed, kind)
    (stored, energy), (expected, expected_energy) = fp8(rows, states), without(lambda: fp8(rows, states))
    for name, tensor in expected.items():
        assert torch.equal(stored[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert torch.equal(energy, expected_energy)
    assert same_states(
        *(decode(stored, states) for decode in (decode_fp8, lambda *args: without(lambda: decode_fp8(*args))))
    )


def decode_fp8(stored: dict[str, torch.Tensor], states: States) -> torch.Tensor:
    out = torch.empty(len(stored["hidden_states"]), states.width, dtype=states.dtype)
    Fp8Codec().decode_into(stored, out, states)
    return out


def same_states(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """The same bits, but for those of NaN."""
    same = found.view(torch.int16) == expected.view(torch.int16)
    return bool((same | (found.isnan() & expected.isnan())).all())


@pytest.mark.parametrize("asked", ["quant", "quant:fine", "quant:60dB"])
@ANYTHING
def test_quant_has_the_same_bytes_energies_and_bits(without, asked, tokens, layers, hidden, kind, seed):
    states = States(torch.bfloat16, layers, hidden)
    rows = awkward(tokens, states, seed, kind)
    codec = codec_named(asked).calibrated(like_an_llm(100, states), states)
    stored, energy = quant_encoded(codec, rows, states)
    expected, expected_energy = without(lambda: quant_encoded(codec, rows, states))
    assert np.array_equal(stored, expected)
    assert np.array_equal(energy, expected_energy)
    for taken in {tokens, (tokens + 1) // 2}:
        found = quant_decoded(codec, stored, rows, states, taken)
        assert same_states(found, without(lambda taken=taken: quant_decoded(codec, stored, rows, states, taken)))


@pytest.mark.parametrize("is_compiled", [True, False])
def test_symbols_that_do_not_get_smaller_are_not_written_over_by_the_next_block(without, is_compiled):
    """One layer whose channels are all in one group: its symbols are where the next block's will be."""
    states = States(torch.bfloat16, 1, 64)
    rows = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (5000, 64)).astype(np.float32)).bfloat16()
    codec = codec_named("quant:46dB").calibrated(rows, states)
    run = (lambda encode: encode()) if is_compiled else without
    stored, _ = run(lambda: quant_encoded(codec, rows, states))
    errors = (quant_decoded(codec, stored, rows, states, 5000).float() - rows.float()).abs()
    assert errors.max() < 0.02


def test_they_are_not_used_where_numpy_adds_in_another_order(monkeypatch):
    assert compiled.compiled_loops.__wrapped__() is not None
    real = np.einsum
    monkeypatch.setattr(np, "einsum", lambda *args: np.nextafter(real(*args), np.float32(9)))
    assert compiled.compiled_loops.__wrapped__() is None


WITHOUT_NUMBA = """
import sys
sys.modules["numba"] = None
from pathlib import Path
from cache_format import FeatureCache
from cache_format.upkeep.recode import recode
from cache_format.codecs.compiled import compiled_loops
for codec in ("zbits", "fp8", "quant"):
    recode(FeatureCache.open(sys.argv[1]), Path(sys.argv[2], codec), codec, threads=2)
    for batch in FeatureCache.open(f"{sys.argv[2]}/{codec}").loader(2):
        assert batch.hidden_states.isfinite().all()
assert compiled_loops() is None
"""


def test_a_cache_is_the_same_file_by_file_without_numba(job, tmp_path):
    commands.made("extract", *job, "--dtype", "bfloat16", "--out", tmp_path / "raw")
    (tmp_path / "without").mkdir()
    subprocess.run([sys.executable, "-c", WITHOUT_NUMBA, tmp_path / "raw", tmp_path / "without"], check=True)
    for codec in ("zbits", "fp8", "quant"):
        commands.made("recode", tmp_path / "raw", tmp_path / codec, "--codec", codec)
        assert contents(tmp_path / codec) == contents(tmp_path / "without" / codec)


def in_a_new_process(code: str, *arguments: object, **environment: str) -> None:
    told = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=True, env=told, timeout=120)


def test_no_loop_goes_beyond_its_arrays():
    """The tests above once more, with numba's checks of every index."""
    command = [sys.executable, "-m", "pytest", "-q", __file__, "-k", "has_the_same_bytes", "-p", "no:cacheprovider"]
    done = subprocess.run(command, env=os.environ | {"NUMBA_BOUNDSCHECK": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


NOT_COMPILED = (
    "import torch\nfrom cache_format.codecs.compiled import loops_for\nassert loops_for(torch.bfloat16) is None"
)


def test_a_numba_that_is_of_no_use_is_as_none(tmp_path):
    in_a_new_process(NOT_COMPILED, NUMBA_DISABLE_JIT="1")
    (tmp_path / "numba.py").write_text("raise AttributeError('of a package that it meets while it is imported')")
    in_a_new_process(NOT_COMPILED, PYTHONPATH=f"{tmp_path}:{ROOT}")


FORKED = """
import os, signal, threading, time
import numpy, torch
from cache_format.codecs import States, codec_named
from cache_format.codecs.compiled import compiled_loops
states = States(torch.bfloat16, 1, 8)
codec = codec_named("quant").calibrated(torch.randn(9, 8).bfloat16(), states)
def use():
    rows, out = numpy.zeros((9, 8), numpy.uint16), numpy.empty(codec.most_bytes(9, states), numpy.uint8)
    codec.encode_sample(rows, {}, out, states, numpy.zeros((9, 2, 1)))
if WHILE == "compiled":
    compiled_loops()
thread = threading.Thread(target=use)
thread.start()
time.sleep(0.1)
assert thread.is_alive()
child = os.fork()
if not child:
    signal.alarm(60)
    use()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
thread.join()
"""


@pytest.mark.parametrize("what", ["imported", "compiled"])
def test_a_child_that_is_forked_meanwhile_does_not_wait_for_ever(what):
    in_a_new_process(f"WHILE = {what!r}{FORKED}")


@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_quant_of_one_wide_layer_has_the_same_bytes(without, tokens):
    """numpy adds up a row that is alone in pieces of 8,192."""
    states = States(torch.bfloat16, 1, 16384)
    codec = codec_named("quant").calibrated(like_an_llm(20, states), states)
    for seed in range(5):
        rows = like_an_llm(tokens, states, seed)
        stored, energy = quant_encoded(codec, rows, states)
        expected, expected_energy = without(lambda rows=rows: quant_encoded(codec, rows, states))
        assert np.array_equal(stored, expected)
        assert np.array_equal(energy, expected_energy)


def test_reading_a_raw_cache_does_not_load_numba(caches):
    code = (
        "import sys\nfrom cache_format import FeatureCache\n"
        "for batch in FeatureCache.open(sys.argv[1]).loader(2): pass\nassert 'numba' not in sys.modules"
    )
    in_a_new_process(code, caches["raw"])
