"""Threads that encode a shard's samples side by side: the bytes of one, and a failure of any is told."""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, count
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_quant import like_an_llm

from cache_format.codecs import QuantCodec, States, ZbitsCodec, codec_named
from cache_format.codecs.encoded_part import EncodedPart
from cache_format.codecs.places import Places
from cache_format.layout.shard_layout import ShardSchema
from cache_format.writing import encode
from cache_format.writing.shard_buffer import ShardBuffer


def shard(lengths: list[int], codec: str, path, encoders: ThreadPoolExecutor | None, into: ShardBuffer | None):
    """A shard of such samples, committed: its bytes, and its memory."""
    states, total = States(torch.bfloat16, 2, 48), sum(lengths)
    rows = like_an_llm(total, states)
    schema = ShardSchema(fingerprint="ab" * 32, codec=codec_named(codec).calibrated(rows, states), states=states)
    raw = {"hidden_states": rows, **{name: torch.ones(total) for name in ("input_ids", "attention_mask", "loss_mask")}}
    ids = np.arange(len(lengths))
    into = encode.encode_shard(schema, 3, ids, np.array(lengths), raw, into, encoders)
    into.commit(path)
    return path.read_bytes(), into


@given(
    st.lists(st.integers(1, 90), min_size=1, max_size=30),
    st.sampled_from(["zbits", "quant"]),
    st.sampled_from([1, 700, 20_000, encode._RUN_BYTES]),
    st.sampled_from([1 << 9, 1 << 17]),
)
def test_the_bytes_are_those_of_one_thread(tmp_path_factory, lengths, codec, run_bytes, block_elements):
    """And of samples that are not cut into parts, whose blocks are a few rows or more than they have."""
    folder = tmp_path_factory.mktemp("shard")
    kind = {"zbits": ZbitsCodec, "quant": QuantCodec}[codec]
    small_blocks = patch.object(sys.modules[kind.__module__], "BLOCK_ELEMENTS", block_elements)
    with small_blocks, patch.object(encode, "_RUN_BYTES", run_bytes), ThreadPoolExecutor(3) as encoders:
        expected, into = shard(lengths, codec, folder / "one", None, None)
        assert shard(lengths, codec, folder / "three", encoders, into)[0] == expected
        with patch.object(kind, "parts", lambda _self, num_tokens, _states: [slice(0, num_tokens)]):
            assert shard(lengths, codec, folder / "whole", None, None)[0] == expected


@pytest.mark.parametrize("codec", [ZbitsCodec(), QuantCodec()], ids=lambda codec: codec.name)
@pytest.mark.parametrize("width", [1, 100, 4096, 200_000])
def test_parts_are_all_rows_in_order(codec, width):
    states = States(torch.bfloat16, 2, width)
    elements = sys.modules[type(codec).__module__].BLOCK_ELEMENTS
    rows = max(1, elements // (states.width if codec.name == "zbits" else width))
    for num_tokens in (0, 1, rows, 16 * rows, 16 * rows + 1, 35 * rows - 1):
        parts = codec.parts(num_tokens, states)
        assert [part.start for part in parts] == [0, *[part.stop for part in parts[:-1]]]
        assert parts[-1].stop == num_tokens
        assert all(part.start % rows == 0 for part in parts)
        assert len(parts) > 1 or num_tokens <= 8 * rows


@given(st.lists(st.integers(0, 50)), st.integers(1, 100))
def test_runs_have_every_item_once_in_order_and_enough_to_do(sizes, run_bytes):
    with patch.object(encode, "_RUN_BYTES", run_bytes):
        runs = encode._runs(sizes)
    assert [item for run in runs for item in run] == list(range(len(sizes)))
    assert all(sum(sizes[item] for item in run) >= run_bytes for run in runs[:-1])


def test_a_sample_that_cannot_be_encoded_is_told_after_all_threads_are_done(tmp_path, monkeypatch):
    begun, done, real = [], [], QuantCodec.encode_part

    def failing(self, rows, *arguments):
        begun.append(len(rows))
        if len(rows) == 7:
            raise MemoryError("no room")
        found = real(self, rows, *arguments)
        time.sleep(0.05)
        done.append(len(rows))
        return found

    monkeypatch.setattr(QuantCodec, "encode_part", failing)
    monkeypatch.setattr(encode, "_RUN_BYTES", 1)
    with ThreadPoolExecutor(3) as encoders:
        with pytest.raises(MemoryError, match="no room"):
            shard([5, 7, *[60] * 40], "quant", tmp_path / "shard", encoders, None)
        assert sorted(begun) == sorted([7, *done])
        assert len(begun) < 42, "the others are not begun any more"
        time.sleep(0.1)
        assert sorted(begun) == sorted([7, *done])


def test_of_several_errors_the_first_is_told(tmp_path, monkeypatch):
    def failing(_self, rows, *_arguments):
        time.sleep(0.02 if len(rows) == 5 else 0)
        raise ValueError(f"a sample of {len(rows)}")

    monkeypatch.setattr(QuantCodec, "encode_part", failing)
    monkeypatch.setattr(encode, "_RUN_BYTES", 1)
    with ThreadPoolExecutor(3) as encoders, pytest.raises(ValueError, match="a sample of 5"):
        shard([5, 6, 7], "quant", tmp_path / "shard", encoders, None)


def test_a_caller_that_is_interrupted_leaves_no_thread_writing(tmp_path, monkeypatch):
    running, real = [], QuantCodec.encode_part

    def slow(*arguments):
        running.append(1)
        time.sleep(0.05)
        found = real(*arguments)
        running.pop()
        return found

    def interrupted(_futures, return_when):
        raise KeyboardInterrupt

    monkeypatch.setattr(QuantCodec, "encode_part", slow)
    monkeypatch.setattr(encode, "_RUN_BYTES", 1)
    real_wait = encode.wait
    monkeypatch.setattr(encode, "wait", lambda futures, **more: (interrupted if more else real_wait)(futures, **more))
    with ThreadPoolExecutor(3) as encoders:
        with pytest.raises(KeyboardInterrupt):
            shard([60] * 40, "quant", tmp_path / "shard", encoders, None)
        assert not running
        time.sleep(0.1)
        assert not running


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4), max_size=6), st.integers(1, 3), st.randoms())
def test_parts_stand_in_order_whatever_is_done_first(samples, groups, random):
    """Of each sample the sizes, then the bytes: group by group, and in a group part by part."""
    numbers = count()
    samples = [[lettered(size, groups, next(numbers)) for size in sample] for sample in samples]
    parts = list(chain.from_iterable(samples))
    expected, starts = b"", [0]
    for sample in samples:
        for group in range(groups):
            expected += b"".join(part.sizes[group].tobytes() for part in sample)
        for group in range(groups):
            expected += b"".join(part.content[group].tobytes() for part in sample)
        starts.append(len(expected))
    out = np.zeros(len(expected), np.uint8)
    places = Places(out, [4 * groups * len(sample) for sample in samples], list(map(len, samples)), groups)
    for number in random.sample(range(len(parts)), len(parts)):
        places.put(number, parts[number])
    assert (out.tobytes(), places.starts) == (expected, starts)
    assert all(part.written == list(range(groups)) for part in parts)


@dataclass(frozen=True)
class _Lettered(EncodedPart):
    content: list[np.ndarray]
    written: list[int] = field(default_factory=list)

    def write(self, group: int, out: np.ndarray) -> None:
        out[:] = self.content[group]
        self.written.append(group)


def lettered(size: int, groups: int, number: int) -> _Lettered:
    """A part of one block a group, of its own bytes."""
    sizes = [size + group for group in range(groups)]
    content = [np.full(length, 16 * group + number % 16, np.uint8) for group, length in enumerate(sizes)]
    return _Lettered(np.array(sizes, "<u4")[:, None], sizes, content)
