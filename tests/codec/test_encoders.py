"""Threads that encode a shard's samples side by side: the bytes of one, and a failure of any is told."""

from __future__ import annotations

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

from cache_format.codecs import QuantCodec, States, codec_named
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
)
def test_the_bytes_are_those_of_one_thread(tmp_path_factory, lengths, codec, run_bytes):
    folder = tmp_path_factory.mktemp("shard")
    with patch.object(encode, "_RUN_BYTES", run_bytes), ThreadPoolExecutor(3) as encoders:
        expected, into = shard(lengths, codec, folder / "one", None, None)
        assert shard(lengths, codec, folder / "three", encoders, into)[0] == expected


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
