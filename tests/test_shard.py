"""A shard: plain safetensors, its size, its bytes, and that nothing foreign is read as one."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from cache_format.codecs import RawCodec, States
from cache_format.errors import CacheError
from cache_format.layout.shard_layout import ShardSchema
from cache_format.layout.shard_reader import ShardFile
from cache_format.writing.shard_buffer import ShardBuffer

FINGERPRINT = "ab" * 32


def schema(dtype=torch.bfloat16, width=24) -> ShardSchema:
    return ShardSchema(fingerprint=FINGERPRINT, codec=RawCodec(), states=States(dtype, 1, width))


def write(path, lengths=(5, 3, 3), shard_schema=None, number=7) -> dict[str, torch.Tensor]:
    shard_schema = shard_schema or schema()
    lengths = np.asarray(lengths)
    total = int(lengths.sum())
    buffer = ShardBuffer(shard_schema.layout(number, len(lengths), total).num_bytes)
    buffer.begin(shard_schema, number, np.arange(len(lengths)) * 10, lengths)
    generator = torch.Generator().manual_seed(0)
    buffer.tensor("hidden_states").copy_(torch.randn(total, shard_schema.states.width, generator=generator))
    buffer.tensor("input_ids").copy_(torch.arange(total))
    buffer.tensor("loss_mask").copy_(torch.arange(total) % 2)
    assert buffer.commit(path) == path.stat().st_size
    return {tensor.name: buffer.tensor(tensor.name).clone() for tensor in shard_schema.token_tensors}


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=12),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(1, 40),
)
def test_any_safetensors_reader_opens_it(tmp_path_factory, lengths, dtype, width):
    path = tmp_path_factory.mktemp("shard") / "a.safetensors"
    written = write(path, lengths, schema(dtype, width))
    loaded = load_file(path)
    for name, tensor in written.items():
        assert torch.equal(loaded[name], tensor)
    assert loaded["hidden_states"].shape == (sum(lengths), width)
    assert loaded["cu_seqlens"].tolist() == [0, *np.cumsum(lengths).tolist()]
    assert loaded["sample_ids"].tolist() == [10 * i for i in range(len(lengths))]
    assert {name: str(t.dtype) for name, t in loaded.items()} == {
        "hidden_states": str(dtype),
        "input_ids": "torch.int32",
        "attention_mask": "torch.uint8",
        "loss_mask": "torch.uint8",
        "cu_seqlens": "torch.int64",
        "sample_ids": "torch.int64",
        "sample_checksums": "torch.uint64",
    }


def test_it_says_what_it_is(tmp_path):
    write(tmp_path / "a")
    with safe_open(tmp_path / "a", "pt") as file:
        assert file.metadata() == {
            "format": "dflash-cache",
            "format_version": "1",
            "fingerprint": FINGERPRINT,
            "shard": "7",
        }


def test_hidden_states_start_on_a_page_and_the_overhead_is_small(tmp_path):
    lengths = [1000] * 100
    write(tmp_path / "a", lengths, schema(torch.bfloat16, 5 * 64))
    with ShardFile(tmp_path / "a", schema(torch.bfloat16, 5 * 64), 7) as shard:
        assert shard.container.places["hidden_states"].start % 4096 == 0
    payload = sum(lengths) * (5 * 64 * 2 + 6)
    assert (tmp_path / "a").stat().st_size <= 1.002 * payload


def test_the_same_content_gives_the_same_bytes(tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_checksums_cover_every_byte(tmp_path):
    write(tmp_path / "a")
    good = (tmp_path / "a").read_bytes()
    with ShardFile(tmp_path / "a", schema(), 7) as shard:
        head = shard.head_checksum()
    for at in [*range(0, len(good), 7), len(good) - 1]:
        bad = bytearray(good)
        bad[at] ^= 1
        (tmp_path / "b").write_bytes(bad)
        try:
            with ShardFile(tmp_path / "b", schema(), 7) as shard:
                samples = range(shard.num_samples)
                same = all(shard.computed_checksum(i) == int(shard.sample_checksums[i]) for i in samples)
                assert not (same and shard.head_checksum() == head), f"byte {at}"
        except CacheError:
            pass


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (ShardSchema(fingerprint="cd" * 32, codec=RawCodec(), states=States(torch.bfloat16, 1, 24)), "fingerprint"),
        (schema(width=25), "header"),
        (schema(dtype=torch.float16), "header"),
    ],
)
def test_a_shard_of_another_cache_is_refused(tmp_path, other, named):
    write(tmp_path / "a")
    with pytest.raises(CacheError, match=named):
        ShardFile(tmp_path / "a", other, 7)


def test_an_undamaged_header_is_compared_and_not_parsed(tmp_path, monkeypatch):
    write(tmp_path / "a")
    monkeypatch.setattr("cache_format.layout.shard_reader.read_container", None)
    with ShardFile(tmp_path / "a", schema(), 7) as shard:
        assert shard.num_tokens == 11


def test_any_change_of_the_header_is_noticed(tmp_path):
    write(tmp_path / "a")
    whole = (tmp_path / "a").read_bytes()
    (size,) = struct.unpack("<Q", whole[:8])
    for at in range(8 + size):
        for bit in (1, 16):
            changed = bytearray(whole)
            changed[at] ^= bit
            (tmp_path / "a").write_bytes(changed)
            with pytest.raises(CacheError):
                ShardFile(tmp_path / "a", schema(), 7)


def test_a_swapped_shard_is_refused(tmp_path):
    write(tmp_path / "a", number=3)
    with pytest.raises(CacheError, match="shard is '3'"):
        ShardFile(tmp_path / "a", schema(), 7)


def entry(dtype="U8", shape=(4,), offsets=(0, 4)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01",
        struct.pack("<Q", 1 << 63),
        struct.pack("<Q", 100) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 4) + b"\xff\xfe{}",
        struct.pack("<Q", 200_000) + b"[" * 200_000,
        *(
            struct.pack("<Q", len(text)) + text + b"\0" * 4
            for text in (
                json.dumps(header).encode()
                for header in (
                    {"a": entry(offsets=(0, 5))},
                    {"a": entry(), "b": entry()},
                    {"a": entry(offsets=(4, 8))},
                    {"a": entry(dtype="OBJ")},
                    {"a": entry(shape=(-4,))},
                    {"a": entry(shape=(2**40, 2**40, 2**40), offsets=(0, 2**120))},
                    {"a": entry(shape=(4.0,))},
                    {"a": [1, 2]},
                    {"__metadata__": {"x": 1}},
                    {"a": entry(shape=(3,), offsets=(0, 3))},
                )
            )
        ),
    ],
)
def test_what_is_not_a_shard_is_an_error_that_names_the_file(tmp_path, content):
    path = tmp_path / "evil.safetensors"
    path.write_bytes(content)
    with pytest.raises(CacheError, match=r"evil\.safetensors"):
        ShardFile(path, schema(), 7)


def test_truncated_missing_and_special_files_are_errors(tmp_path):
    write(tmp_path / "a")
    data = (tmp_path / "a").read_bytes()
    for size in (len(data) - 1, len(data) // 2, 100, 7):
        (tmp_path / "b").write_bytes(data[:size])
        with pytest.raises(CacheError):
            ShardFile(tmp_path / "b", schema(), 7)
    (tmp_path / "b").write_bytes(data + b"\0")
    with pytest.raises(CacheError, match="extended"):
        ShardFile(tmp_path / "b", schema(), 7)
    with pytest.raises(CacheError, match="missing"):
        ShardFile(tmp_path / "nowhere", schema(), 7)
    with pytest.raises(CacheError, match="regular"):
        ShardFile(tmp_path, schema(), 7)


def test_leaving_samples_out_compacts_the_rest(tmp_path):
    lengths = np.array([5, 3, 4])
    buffer = ShardBuffer(1 << 20)
    buffer.begin(schema(), 1, np.array([8, 6, 7]), lengths)
    buffer.tensor("hidden_states").copy_(torch.arange(12)[:, None].expand(12, 24))
    buffer.without(np.array([False, True, False])).commit(tmp_path / "a")
    loaded = load_file(tmp_path / "a")
    assert loaded["sample_ids"].tolist() == [8, 7]
    assert loaded["hidden_states"][:, 0].tolist() == [0, 1, 2, 3, 4, 8, 9, 10, 11]
    buffer.without(np.array([True, True, True])).commit(tmp_path / "b")
    with ShardFile(tmp_path / "b", schema(), 1) as shard:
        assert (shard.num_samples, shard.num_tokens) == (0, 0)
