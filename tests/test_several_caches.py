"""Several caches as one, and what a loader takes of a cache: weights, split, trim, max_length, skip."""

from __future__ import annotations

import itertools
import json
import pickle

import numpy as np
import pytest
import torch
from synthetic import LAYER_IDS, random_samples, write_cache
from torch.utils.data import DataLoader

from cache_format import (
    CacheError,
    CacheLoader,
    DFlashTargetBatch,
    FeatureCache,
    Index,
    InputError,
    MismatchError,
    collate,
)
from cache_format.layout.collection import Member, member, write_collection

LENGTHS = ([5, 31, 12, 1, 17, 9, 26], [8, 40, 3], [22, 14, 6, 19, 2, 33, 11, 28, 7, 10])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    for number, (lengths, codec) in enumerate(zip(LENGTHS, ("raw", "raw", "fp8"), strict=True)):
        write_cache(folder / f"c{number}", lengths, dtype="bfloat16", hidden=64, codec=codec)
    return folder


def tokens(batch: DFlashTargetBatch) -> list[list[int]]:
    return [ids[mask.bool()].tolist() for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]


def same(a: DFlashTargetBatch, b: DFlashTargetBatch) -> bool:
    return all(x is y is None or torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


@pytest.mark.parametrize("numbers", [(0,), (0, 1), (2, 0, 1)])
def test_samples_come_one_cache_after_the_other(folder, numbers):
    parts = [FeatureCache.open(folder / f"c{n}") for n in numbers]
    joined = FeatureCache.open([folder / f"c{n}" for n in numbers])
    wanted = [part[i] for part in parts for i in range(len(part))]
    assert len(joined) == len(wanted)
    assert joined.target_layer_ids == LAYER_IDS
    for cache in (joined, FeatureCache.concat(parts), pickle.loads(pickle.dumps(joined))):
        assert all(same(a, b) for a, b in zip(cache, wanted, strict=True))
        assert same(cache.batch([0, -1]), collate([wanted[0], wanted[-1]]))
    assert same(joined[1:4], collate(wanted[1:4]))
    with pytest.raises(IndexError):
        joined[len(wanted)]
    seen = joined.view(layers=[3], dtype="float32").batch(range(len(joined)))
    assert torch.equal(seen.hidden_states, collate(wanted).hidden_states[..., 128:].float())
    got = DataLoader(joined, batch_size=4, collate_fn=collate)
    assert [row for b in got for row in tokens(b)] == [row for b in wanted for row in tokens(b)]


@pytest.mark.parametrize("options", [{"batch_size": 3}, {"batch_tokens": 64}, {"batch_size": 2, "pack_to": 64}])
@pytest.mark.parametrize("shuffle", [False, True, "window"])
def test_every_sample_of_all_once_an_epoch_and_resumed_exactly(folder, options, shuffle):
    joined = FeatureCache.open([folder / f"c{n}" for n in range(3)])
    whole = [tokens(b) for b in joined.loader(**options, shuffle=shuffle, window_shards=2)]
    flat = sorted(itertools.chain.from_iterable(itertools.chain.from_iterable(whole)))
    assert flat == sorted(
        itertools.chain.from_iterable(s.input_ids.tolist() for n in LENGTHS for s in random_samples(n))
    )
    loader = joined.loader(**options, shuffle=shuffle, window_shards=2)
    assert [tokens(b) for b in itertools.islice(loader, 2)] == whole[:2]
    again = joined.loader(**options, shuffle=shuffle, window_shards=2)
    again.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    assert [tokens(b) for b in again] == whole[2:]
    assert [tokens(b) for b in joined.loader(**options, shuffle=shuffle, window_shards=2).skip(2)] == whole[2:]


@pytest.mark.parametrize("shuffle", [False, True])
def test_weights_say_how_often_samples_come(folder, shuffle):
    weights = [0.5, 2, 1]
    joined = FeatureCache.open([folder / f"c{n}" for n in range(3)], weights=weights)
    loader, whole = joined.loader(2, shuffle=shuffle), []
    for epoch in range(4):
        batches = [tokens(b) for b in loader]
        assert len(batches) == len(loader) == -(-(4 + 6 + 10) // 2), epoch
        whole.append([tuple(row) for b in batches for row in b])
    again = joined.loader(2, shuffle=shuffle)
    again.set_epoch(2)
    assert [tuple(row) for b in again for row in tokens(b)] == whole[2]
    seen = [sum(epoch.count(tuple(row)) for epoch in whole) for cache in joined for row in tokens(cache)]
    assert set(seen[7:10]) == {8}
    assert set(seen[10:]) == {4}
    assert sorted(seen[:7]) == [2] * 5 + [3] * 2, "16 draws of 7 samples, none before its turn"
    plain = FeatureCache.open([folder / f"c{n}" for n in range(3)])
    with pytest.raises(MismatchError, match="weights"):
        plain.loader(2, shuffle=shuffle).load_state_dict(loader.state_dict())


@pytest.mark.parametrize("weights", [[1], [1, 0], [1, -1], [1, float("nan")], [1, "2"], [True, 1]])
def test_weights_that_cannot_be(folder, weights):
    with pytest.raises(InputError, match="weights="):
        FeatureCache.open([folder / "c0", folder / "c1"], weights=weights)
    with pytest.raises(InputError, match="weights="):
        FeatureCache.open(folder / "c0", weights=[1])


@pytest.mark.parametrize(
    ("other", "field"), [({"dtype": "float32"}, "dtype"), ({"hidden": 32}, "hidden_size"), ({"name": "else"}, "target")]
)
def test_caches_that_do_not_go_together_are_refused_naming_both(folder, tmp_path, other, field):
    write_cache(tmp_path / "other", [4, 5], **{"dtype": "bfloat16", "hidden": 64, **other})
    with pytest.raises(MismatchError) as error:
        FeatureCache.open([folder / "c0", tmp_path / "other"])
    assert set(error.value.fields) == {field}
    assert str(folder / "c0") in str(error.value)
    assert str(tmp_path / "other") in str(error.value)
    view = FeatureCache.open(folder / "c0").view(layers=[0])
    with pytest.raises(MismatchError, match="target_layer_ids"):
        FeatureCache.concat([FeatureCache.open(folder / "c0"), view])


def test_a_collection_opens_all_it_lists(folder):
    path = folder / "collection.json"
    members = [member(folder / f"c{n}", path) for n in range(3)]
    write_collection(path, members)
    for place in (folder, path):
        assert len(FeatureCache.open(place)) == sum(map(len, LENGTHS))
    write_collection(path, [Member("c1", members[0].fingerprint)])
    with pytest.raises(CacheError, match="fingerprint is another"):
        FeatureCache.open(folder)
    content = json.loads(path.read_text())
    for bad in ({"name": "../c1"}, {"name": "/c1"}, {"name": ".."}, {"name": 1}, {"fingerprint": ""}, {"more": 1}):
        path.write_text(json.dumps({**content, "caches": [{**content["caches"][0], **bad}]}))
        with pytest.raises(CacheError, match=r"collection.json: is damaged or foreign"):
            FeatureCache.open(folder)
    path.unlink()


def test_filters_see_what_max_length_leaves(folder):
    cache = FeatureCache.open(folder / "c2")
    masks = [s.loss_mask for s in random_samples(LENGTHS[2])]
    seen = {}

    def look(index: Index) -> np.ndarray:
        seen.update(tokens=index.num_tokens.tolist(), learned=index.num_loss_tokens.tolist())
        return index.num_loss_tokens >= 4

    for options, lengths in (({}, map(len, masks)), ({"max_length": 9}, (min(9, len(m)) for m in masks))):
        lengths = list(lengths)
        learned = [int(m[:n].sum()) for m, n in zip(masks, lengths, strict=True)]
        loader = cache.loader(3, filter=look, **options)
        assert (seen["tokens"], seen["learned"]) == (lengths, learned)
        got = [int(n) for b in loader for n in b.loss_mask.sum(1)]
        assert got == [n for n in learned if n >= 4]


@pytest.mark.parametrize("max_length", [None, 9])
def test_trim_leaves_nothing_after_the_last_learned_token(folder, max_length):
    joined = FeatureCache.open([folder / "c0", folder / "c2"])
    masks = [s.loss_mask[:max_length] for n in (0, 2) for s in random_samples(LENGTHS[n])]
    ends = [int(np.flatnonzero(m)[-1]) + 1 for m in masks if m.any()]
    loader = joined.loader(1, trim=True, max_length=max_length)
    assert [b.input_ids.shape[1] for b in loader] == ends
    with pytest.raises(MismatchError, match="trim"):
        joined.loader(1, max_length=max_length, filter=lambda i: i.num_loss_tokens > 0).load_state_dict(
            loader.state_dict()
        )


@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_a_split_leaves_no_sample_out_and_none_in_both(tmp_path, share):
    write_cache(tmp_path / "c", [3] * 400, dtype="bfloat16")
    cache = FeatureCache.open(tmp_path / "c")
    ids: list[np.ndarray] = []
    for split in (("train", 1 - share), ("validation", share)):
        loader = cache.loader(8, split=split)
        ids.append(loader._samples)
    assert sorted(np.concatenate(ids).tolist()) == list(range(400))
    assert abs(len(ids[1]) - 400 * share) < 40
    assert not np.array_equal(ids[1], np.arange(len(ids[1])))


@pytest.mark.parametrize("split", [("train", 1.0), ("train", 0), ("test", 0.5), "train", ("train",), ("train", "x"), 3])
def test_a_split_that_cannot_be(folder, split):
    with pytest.raises(InputError, match="split="):
        FeatureCache.open(folder / "c0").loader(2, split=split)


def test_skip_goes_no_further_than_the_epoch(folder):
    cache = FeatureCache.open([folder / "c0", folder / "c2"])
    loader = cache.loader(2, shuffle=True)
    assert list(loader.skip(len(loader))) == []
    assert loader.epoch == 1
    for steps in (len(loader) + 1, -1, 1.5):
        with pytest.raises(InputError, match="skip"):
            loader.skip(steps)
    for rank in range(2):
        whole = [tokens(b) for b in cache.loader(2, shuffle=True, rank=rank, world_size=2)]
        skipped = [tokens(b) for b in cache.loader(2, shuffle=True, rank=rank, world_size=2).skip(2)]
        assert skipped == whole[2:]


def test_what_is_printed_are_shapes(folder):
    cache = FeatureCache.open(folder / "c0")
    assert "hidden_states=bfloat16 [2, 31, 192]" in repr(cache[0:2])
    assert "tensor(" not in repr(cache[0:2])
    loader = cache.loader(2, shuffle=True)
    assert isinstance(loader, CacheLoader)
    assert "7 samples, 4 steps an epoch" in repr(loader)
    with pytest.raises(InputError, match=r"FeatureCache\.open\(path\)"):
        FeatureCache(folder / "c0")
    assert same(cache.batch(torch.tensor([1, 2])), cache.batch([1, 2]))
    with pytest.raises(InputError, match="filter= leaves none of the 7 samples"):
        cache.loader(2, filter=lambda index: index.num_tokens > 99)
