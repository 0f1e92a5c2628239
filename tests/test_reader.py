"""FeatureCache: what a trainer gets, that it survives workers, and that it refuses what it should not read."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from synthetic import HIDDEN, LAYER_IDS, VOCAB, states_of, write_cache
from torch.utils.data import DataLoader

from cache_format import CacheError, DFlashTargetBatch, FeatureCache, InputError, MismatchError

LENGTHS = [5, 90, 17, 1, 40, 33, 64, 2, 71, 12]
WIDTH = len(LAYER_IDS) * HIDDEN


@pytest.fixture(scope="module")
def cache_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("cache") / "cache"
    write_cache(path, LENGTHS)
    return path


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    return write_cache(tmp_path_factory.mktemp("cache") / "again", LENGTHS)


def first(batches: list) -> DFlashTargetBatch:
    return batches[0]


def test_a_sample_is_what_was_written(cache_path, samples):
    cache = FeatureCache.open(cache_path)
    assert len(cache) == len(LENGTHS)
    assert cache.target_layer_ids == LAYER_IDS
    assert cache.hidden_size == HIDDEN
    for i, sample in enumerate(samples):
        got = cache[i]
        assert torch.equal(got.hidden_states[0], states_of(i, LENGTHS[i], "float32", WIDTH))
        assert got.input_ids[0].tolist() == sample.input_ids.tolist()
        assert got.loss_mask[0].tolist() == sample.loss_mask.tolist()
        assert got.attention_mask.tolist() == [[1] * LENGTHS[i]]
        assert got.input_ids.dtype == got.loss_mask.dtype == got.attention_mask.dtype == torch.int64


def test_a_batch_is_right_padded_with_zeros(cache_path, samples):
    cache = FeatureCache.open(cache_path)
    chosen = [3, 1, 4]
    batch = cache.batch(chosen)
    assert batch.hidden_states.shape == (3, 90, WIDTH)
    for row, i in enumerate(chosen):
        length = LENGTHS[i]
        assert torch.equal(batch.hidden_states[row, :length], states_of(i, length, "float32", WIDTH))
        assert batch.input_ids[row, :length].tolist() == samples[i].input_ids.tolist()
        assert batch.attention_mask[row].tolist() == [1] * length + [0] * (90 - length)
        for name in ("hidden_states", "input_ids", "loss_mask"):
            assert not getattr(batch, name)[row, length:].any()


def test_one_sample_is_read_without_a_copy_and_writing_to_it_changes_no_file(cache_path):
    cache = FeatureCache.open(cache_path)
    before = {p.name: p.read_bytes() for p in (cache_path / "shards").iterdir()}
    first_read, second_read = cache[1].hidden_states, cache[1].hidden_states
    assert first_read.untyped_storage().data_ptr() == second_read.untyped_storage().data_ptr()
    first_read.zero_()
    assert {p.name: p.read_bytes() for p in (cache_path / "shards").iterdir()} == before


def test_bad_indices(cache_path):
    cache = FeatureCache.open(cache_path)
    assert torch.equal(cache[-1].input_ids, cache[len(LENGTHS) - 1].input_ids)
    for i in (len(LENGTHS), -len(LENGTHS) - 1):
        with pytest.raises(IndexError):
            cache[i]
    with pytest.raises(InputError):
        cache.batch([])


def test_embeddings_are_frozen_and_from_the_cache(cache_path):
    cache = FeatureCache.open(cache_path)
    embed, head = cache.get_input_embeddings(), cache.get_output_embeddings()
    assert embed(torch.tensor([[1, 2]])).shape == (1, 2, HIDDEN)
    assert head(torch.zeros(1, HIDDEN)).shape == (1, VOCAB)
    assert not any(p.requires_grad for p in [*embed.parameters(), *head.parameters()])
    assert not torch.equal(embed.weight, head.weight)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_dataloader_workers_read_it(cache_path, context):
    cache = FeatureCache.open(cache_path)
    assert cache[0].input_ids.shape == (1, 5)
    loader = DataLoader(cache, batch_size=1, num_workers=2, multiprocessing_context=context, collate_fn=first)
    for i, got in enumerate(loader):
        assert torch.equal(got.hidden_states, cache[i].hidden_states)


def test_pickling_keeps_what_was_expected(cache_path):
    cache = FeatureCache.open(cache_path, expect={"hidden_size": HIDDEN})
    again = pickle.loads(pickle.dumps(cache))
    assert torch.equal(again[2].hidden_states, cache[2].hidden_states)


@pytest.mark.parametrize(
    "expect",
    [
        {"target": "another"},
        {"target_layer_ids": [0, 3, 2]},
        {"hidden_size": 8},
        {"dtype": torch.bfloat16},
        {"codec": "fp8"},
        {"vocab_size": 1},
    ],
)
def test_a_cache_that_is_not_what_the_trainer_expects_is_refused_naming_both_sides(cache_path, expect):
    with pytest.raises(MismatchError) as error:
        FeatureCache.open(cache_path, expect=expect)
    ((name, (have, asked)),) = error.value.fields.items()
    assert {name} == set(expect)
    assert repr(have) in str(error.value)
    assert repr(asked) in str(error.value)


def test_what_is_expected_and_there_opens(cache_path):
    expect = {"target": "synthetic", "target_layer_ids": tuple(LAYER_IDS), "dtype": torch.float32, "codec": "raw"}
    assert len(FeatureCache.open(cache_path, expect=expect)) == len(LENGTHS)
    with pytest.raises(InputError, match="hiden_size"):
        FeatureCache.open(cache_path, expect={"hiden_size": 1})


def test_an_unfinished_cache_is_refused_unless_asked_for(tmp_path):
    write_cache(tmp_path / "c", [300] * 40, only_shards=[1])
    with pytest.raises(CacheError, match="not complete"):
        FeatureCache.open(tmp_path / "c")
    cache = FeatureCache.open(tmp_path / "c", allow_incomplete=True)
    assert 0 < len(cache) < 40
    sample_id = int(cache.index.sample_id[0])
    assert torch.equal(cache[0].hidden_states[0], states_of(sample_id, 300, "float32", WIDTH))


def test_quarantined_samples_never_come_out(tmp_path):
    write_cache(tmp_path / "c", LENGTHS, quarantined=(0, 4))
    cache = FeatureCache.open(tmp_path / "c")
    assert cache.manifest.quarantined == [0, 4]
    assert cache.index.sample_id.tolist() == [1, 2, 3, 5, 6, 7, 8, 9]
    assert torch.equal(cache[0].hidden_states[0], states_of(1, 90, "float32", WIDTH))


def test_not_a_cache(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CacheError, match="not a feature cache"):
            FeatureCache.open(path)


def test_an_index_row_outside_its_shard_is_an_error(tmp_path):
    from cache_format.layout.index import Index, read_index, write_index

    write_cache(tmp_path / "c", LENGTHS)
    manifest = FeatureCache.open(tmp_path / "c").manifest
    index = read_index(tmp_path / "c" / "index.arrow", manifest.fingerprint)
    for column, value in (("shard", 99), ("row_start", 10**12), ("row_start", -1), ("num_tokens", 0)):
        columns = {name: np.array(getattr(index, name)) for name in Index.__slots__}
        columns[column][2] = value
        write_index(tmp_path / "c" / "index.arrow", Index(**columns), manifest.fingerprint)
        with pytest.raises(CacheError, match=r"index\.arrow"):
            FeatureCache.open(tmp_path / "c")[2]


def test_more_shards_than_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr("cache_format.reading.open_shards.MAX_OPEN_SHARDS", 2)
    write_cache(tmp_path / "c", [300] * 12)
    cache = FeatureCache.open(tmp_path / "c")
    assert cache.manifest.totals.shards > 4
    kept = [cache[i] for i in range(12)]
    assert len(os.listdir("/proc/self/fd")) < 100
    for i, sample in enumerate(kept):
        assert torch.equal(sample.hidden_states[0], states_of(i, 300, "float32", WIDTH))


def test_bfloat16_bits_are_kept(tmp_path):
    write_cache(tmp_path / "c", LENGTHS, dtype="bfloat16")
    got = FeatureCache.open(tmp_path / "c").batch([1]).hidden_states[0]
    assert torch.equal(got.view(torch.int16), states_of(1, 90, "bfloat16", WIDTH).view(torch.int16))


def test_importing_the_reader_brings_in_nothing_heavy():
    code = (
        "from cache_format import FeatureCache; import sys, json; "
        "print(json.dumps([m for m in sys.modules if '.' not in m]))"
    )
    modules = json.loads(
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout
    )
    assert not {"transformers", "datasets", "typer", "extractor", "rich"} & set(modules)
    assert "torch" in modules


def test_a_plain_loader_gives_every_sample_once(cache_path):
    cache = FeatureCache.open(cache_path)
    for shuffle in (False, True):
        lengths = [int(n) for b in cache.loader(batch_size=3, shuffle=shuffle) for n in b.attention_mask.sum(1)]
        assert sorted(lengths) == sorted(LENGTHS)
    assert len(list(cache.loader(batch_size=3, drop_last=True))) == 3


def test_reading_can_verify_each_sample(tmp_path):
    write_cache(tmp_path / "c", LENGTHS)
    cache = FeatureCache.open(tmp_path / "c", verify="sample")
    assert cache.batch(range(len(cache))).hidden_states.shape[0] == len(LENGTHS)
    path = tmp_path / "c" / "shards" / f"shard-{int(cache.index.shard[1]):05d}.safetensors"
    data = bytearray(path.read_bytes())
    data[4096 + int(cache.index.row_start[1]) * WIDTH * 4 + 7] ^= 1
    path.write_bytes(data)
    assert FeatureCache.open(tmp_path / "c")[1] is not None, "not looked for unless asked"
    cache = pickle.loads(pickle.dumps(FeatureCache.open(tmp_path / "c", verify="sample")))
    for read in (lambda: cache[1], lambda: cache.batch([0, 1])):
        with pytest.raises(CacheError, match=rf"{path.name}: sample 1 .*dflash-cache repair"):
            read()
    with pytest.raises(InputError):
        FeatureCache.open(tmp_path / "c", verify="all")
