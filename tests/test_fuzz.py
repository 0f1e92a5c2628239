"""Mutated files: read correctly or refused; single flipped bits: found. scripts/fuzz.py does the same for longer."""

from __future__ import annotations

import json
import os
import signal
import struct
from contextlib import closing

import fuzz
import fuzz_codecs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_format import CacheError
from cache_format.codecs import CODECS
from cache_format.layout.safetensors_file import read_container
from cache_format.storage.byte_source import LocalFile


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "cache"
    fuzz.make(path)
    return path


def test_mutated_files(cache, tmp_path):
    results = list(fuzz.run(cache, range(1_000_000, 1_000_250), tmp_path))
    assert len(results) == 250
    assert [result for result in results if result[2].startswith("FINDING")] == []
    kinds = {kind for _, kind, _ in results}
    assert kinds == {"manifest.json", "index.arrow", "shards.arrow", "shards/", "samples/", "target/"}


@pytest.mark.parametrize("codec", [name for name in CODECS if name != "raw"])
def test_mutated_codec_streams(codec, tmp_path):
    """The original, or an error that names the shard; the tables that all samples share are no exception."""
    results = fuzz_codecs.run(tmp_path / "cache", codec, "bfloat16", range(60), tmp_path)
    assert len(results) == 60
    assert [result for result in results if result[2].startswith("FINDING")] == []
    assert sum(result == "refused" for _, _, result in results) > 20


def test_a_crash_of_the_interpreter_is_a_finding_and_not_the_end(cache, tmp_path, monkeypatch):
    exercise = fuzz.exercise
    calls = []

    def dies_at_the_third(path):
        calls.append(path)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return exercise(path)

    monkeypatch.setattr(fuzz, "exercise", dies_at_the_third)
    results = list(fuzz.run(cache, range(5), tmp_path))
    assert [seed for seed, _, result in results if "crashed" in result] == [2]
    assert len(results) == 5
    assert len(list(tmp_path.iterdir())) == 1


def test_every_flipped_bit_is_found(cache):
    found = fuzz.flip_bits(cache, 300, seed=7)
    assert sum(found.values()) == 300
    assert {kind for kind, whole in found.items() if not kind[1]} == set()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "I64", "U8", "BOOL", "F4"]) | JSON,
        "shape": st.lists(st.integers(-1, 1 << 65), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-1, 100), min_size=2, max_size=2) | JSON,
    }
)


@given(st.binary(max_size=300) | st.dictionaries(st.text(max_size=5), ENTRY | JSON, max_size=4), st.binary(max_size=64))
def test_any_header_is_parsed_or_refused(tmp_path_factory, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path_factory.getbasetemp() / "header.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    try:
        with closing(LocalFile(path)) as file:
            container = read_container(file)
    except CacheError:
        return
    assert sum(place.num_bytes for place in container.places.values()) == len(data)
    assert all(8 + len(text) <= p.start <= p.stop <= path.stat().st_size for p in container.places.values())
