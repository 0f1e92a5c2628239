"""cache_format.adapters: the records and batches that other projects' trainers get, without these projects.

scripts/test_peers.sh runs the projects themselves.
"""

from __future__ import annotations

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from cache_format import FeatureCache, InputError, MismatchError
from cache_format.adapters import angelslim, deepspec, modelopt, speculators
from cache_format.adapters.specforge import Batches, features
from cache_format.export.vocab_map import vocab_map

LAYERS, LAST = [1, 4, 5], 5


@pytest.fixture(scope="module")
def cache(job, once) -> FeatureCache:
    """Of the target's last layer among others, and what its head takes."""
    import commands

    arguments = [*job, "--target-layers", ",".join(map(str, LAYERS)), "--capture", "last_hidden_states", "--limit", "8"]
    return FeatureCache.open(once("adapters", lambda out: commands.made("extract", *arguments, "--out", out)))


def test_records_are_those_of_each_project(cache):
    sample = cache[3]
    assert sample.last_hidden_states is not None
    ids, mask, states = sample.input_ids[0], sample.loss_mask[0], sample.hidden_states[0]
    last = sample.last_hidden_states[0]
    blocks = states.unflatten(1, (3, -1))

    one = deepspec.CacheRecords(cache.view(layers=[1, 4]))[3]
    assert (one["input_ids"].dtype, one["loss_mask"].dtype) == (torch.int32, torch.uint8)
    assert torch.equal(one["target_hidden_states"], blocks[:, :2].flatten(1).bfloat16())
    assert torch.equal(one["target_last_hidden_states"], last.bfloat16())

    one = angelslim.dataset(cache)[3]
    assert torch.equal(one["hidden_states"][0], torch.cat([blocks[:, :2].flatten(1), last], 1)), "after the norm"
    assert torch.equal(one["target_hiddens"][0], last)
    assert one["attention_mask"].all()

    for only, learned in ((True, mask), (False, torch.ones_like(mask))):
        one = modelopt.dataset(cache, answer_only_loss=only)[3]
        assert torch.equal(one["loss_mask"], learned)
        assert torch.equal(one["aux_hidden_states"], torch.cat([blocks[:, :2].flatten(1), last], 1)), "after the norm"
        assert torch.equal(one["labels"], torch.cat([ids[1:], torch.tensor([-100])]))

    seen = speculators.seen_by_draft(cache, [4])
    one = speculators.CacheDataset(seen, 512)[3]
    assert torch.equal(one["hidden_states"], blocks[:, 1])
    assert torch.equal(one["verifier_last_hidden_states"], blocks[:, 2]), "before the norm"
    assert one["lengths"].tolist() == [len(ids)]
    parts = [speculators.CacheDataset(seen, 512, 0.75, split) for split in ("train", "val")]
    assert [len(part) for part in parts] == [6, 2]
    assert parts[0].approx_lengths + parts[1].approx_lengths == cache.index.num_tokens.tolist()
    for records in (parts[1], deepspec.CacheRecords(cache), modelopt.dataset(cache)):
        again = pickle.loads(pickle.dumps(records))
        for name, value in records[0].items():
            assert value is False or torch.equal(value, again[0][name])


def test_batches_have_what_a_strategy_of_specforge_asks_for(cache):
    batch = cache.batch([0, 5])
    assert set(features(batch, "dflash")) == {"input_ids", "hidden_states", "loss_mask"}
    assert torch.equal(features(batch, "dspark")["target_last_hidden_states"], batch.last_hidden_states)
    one = features(batch, "eagle3")
    assert set(one) == {"input_ids", "attention_mask", "loss_mask", "hidden_state", "target"}
    for row, length in enumerate(batch.attention_mask.sum(1).tolist()):
        assert one["loss_mask"][row, length - 1] == 0
        assert torch.equal(one["loss_mask"][row, : length - 1], batch.loss_mask[row, : length - 1])
    loader = cache.loader(2)
    batches = Batches(loader, "eagle3")
    assert len(batches) == 4
    batches.set_epoch(3)
    batches.seek(2)
    assert (loader.epoch, loader.steps_left) == (3, 2)
    with pytest.raises(InputError, match="choose one of dflash"):
        Batches(loader, "medusa")


def test_what_was_not_captured_is_asked_for_by_name(made):
    plain = FeatureCache.open(made)
    for needs in (deepspec.CacheRecords, angelslim.dataset, modelopt.dataset):
        with pytest.raises(InputError, match="--capture last_hidden_states"):
            needs(plain)
    with pytest.raises(InputError, match="--capture last_hidden_states"):
        features(plain.batch([0]), "eagle3")
    with pytest.raises(InputError, match="--target-layers 4,0,2,5"):
        speculators.seen_by_draft(plain)


def test_a_draft_vocabulary_is_of_the_tokens_that_are_learned_most(made, cli, tmp_path):
    cache = FeatureCache.open(made)
    counts = np.zeros(cache.manifest.target.vocab_size, np.int64)
    for sample in cache:
        np.add.at(counts, sample.input_ids[0][sample.loss_mask[0] == 1].numpy(), 1)
    assert np.array_equal(cache.learned_counts(), counts)
    assert np.array_equal(FeatureCache.open([made, made]).learned_counts(), 2 * counts)

    code, said, _ = cli("vocab-map", made, tmp_path, "--size", 64, "--json")
    assert code == 0
    d2t, t2d = (np.load(tmp_path / f"{name}.npy") for name in ("d2t", "t2d"))
    tokens = d2t + np.arange(64)
    assert (d2t.dtype, t2d.dtype, len(t2d)) == (np.int64, bool, len(counts))
    assert np.array_equal(np.flatnonzero(t2d), tokens)
    assert counts[tokens].min() >= counts[~t2d].max()
    assert json.loads(said)["covered"] == pytest.approx(counts[tokens].sum() / counts.sum())
    maps = torch.load(tmp_path / "vocab_mapping.pt", weights_only=True)
    assert np.array_equal(maps["d2t"].numpy(), d2t)
    assert np.array_equal(maps["t2d"].numpy(), t2d)
    chosen = torch.load(tmp_path / "selected_token_ids.pt", weights_only=True)
    assert (chosen["selected_token_ids"].tolist(), chosen["target_vocab_size"]) == (tokens.tolist(), len(counts))
    # More than there are: the lowest ids fill it up.
    few = vocab_map(np.array([0, 3, 0, 5, 0]), 4)
    assert (few.tokens.tolist(), few.covered) == ([0, 1, 2, 3], 1.0)
    code, _, said = cli("vocab-map", made, tmp_path, "--size", 10**6)
    assert code == 2
    assert "choose fewer, at least 1" in said


def test_expect_tells_a_target_by_what_it_is(made, tiny_target, tmp_path, monkeypatch):
    cache = FeatureCache.open(made)
    (tmp_path / "link").symlink_to(tiny_target)
    monkeypatch.chdir(tiny_target.parent)
    for target in (tiny_target, tmp_path / "link", f"./{tiny_target.name}", f"{tiny_target}/", cache, cache.manifest):
        assert len(FeatureCache.open(made, expect={"target": target})) == len(cache)
    weights = cache.manifest.identity["target.weights"]
    FeatureCache.open(made, expect={"target.weights": weights})
    with pytest.raises(MismatchError, match=r"target\.weights"):
        FeatureCache.open(made, expect={"target.weights": "another"})
    with pytest.raises(MismatchError, match="target"):
        FeatureCache.open(made, expect={"target": tmp_path})
    moved = replace(cache.manifest, target=replace(cache.manifest.target, name="elsewhere"))
    FeatureCache.open(made, expect={"target": moved})
    other = cache.manifest.extracting({**cache.manifest.identity, "target.weights": "another"})
    with pytest.raises(MismatchError, match=r"target\.weights"):
        FeatureCache.open(made, expect={"target": other})
