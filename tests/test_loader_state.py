"""The loader's state: it belongs to the iteration that gave the batch, and nonsense is told, not lived with."""

from __future__ import annotations

import copy
import json
import os
import signal

import pytest
import torch
from synthetic import write_cache
from torch.utils.data import ConcatDataset, DataLoader

from cache_format import DFlashTargetBatch, FeatureCache, InputError, MismatchError, collate

LENGTHS = [3, 9, 4, 7, 5, 8, 2, 6]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    path = tmp_path_factory.mktemp("loader-state") / "cache"
    write_cache(path, LENGTHS, dtype="bfloat16", hidden=32)
    return FeatureCache.open(path)


def ids(batch: DFlashTargetBatch) -> list[int]:
    return batch.input_ids[batch.attention_mask.bool()].tolist()


def test_the_epoch_stands_while_it_is_iterated_over(cache):
    loader = cache.loader(2, shuffle=True)
    whole = [ids(b) for b in loader]
    loader = cache.loader(2, shuffle=True)
    seen = []
    for batch in loader:
        seen.append(ids(batch))
        with pytest.raises(InputError, match=r"set_epoch\(7\) in the middle of epoch 0"):
            loader.set_epoch(7)
        with pytest.raises(InputError, match=r"load_state_dict\(\) in the middle of epoch 0"):
            loader.load_state_dict(loader.state_dict())
        loader.set_epoch(0)
        assert loader.state_dict()["epoch"] == 0
        assert loader.state_dict()["batches_done"] == len(seen)
    assert seen == whole
    loader.set_epoch(7)
    assert loader.epoch == 7


def test_the_epoch_may_change_once_the_loop_is_left(cache):
    loader = cache.loader(2, shuffle=True)
    for _ in loader:
        break
    loader.set_epoch(7)
    batches = iter(loader)
    next(batches)
    assert loader.state_dict() | {"order": 0} == {"epoch": 7, "batches_done": 1, "order": 0}
    batches.close()
    loader.load_state_dict(loader.state_dict())
    assert len(list(loader)) == len(LENGTHS) // 2 - 1


def test_a_loader_stands_at_one_place(cache):
    """The state is the later iteration's, and the earlier one does not go on in silence."""
    loader = cache.loader(2)
    whole = [ids(b) for b in loader]
    loader.set_epoch(0)
    one, other = iter(loader), iter(loader)
    next(one)
    next(one)
    assert ids(next(other)) == whole[0]
    assert loader.state_dict()["batches_done"] == 1
    with pytest.raises(InputError, match="another iteration of it was begun"):
        next(one)
    assert loader.state_dict()["batches_done"] == 1
    assert [ids(b) for b in other] == whole[1:]
    assert loader.epoch == 1


@pytest.mark.parametrize(
    "change",
    [
        {"batches_done": -3},
        {"batches_done": 1.5},
        {"batches_done": "2"},
        {"batches_done": True},
        {"batches_done": 10**9},
        {"batches_done": 10**30},
        {"batches_done": None},
        {"epoch": -1},
        {"epoch": 0.5},
        {"epoch": 10**30},
        {"order": None},
        {"order": [1]},
        {"order": {}},
    ],
    ids=repr,
)
def test_a_state_that_is_nonsense_is_told(cache, change):
    loader = cache.loader(2, shuffle=True)
    before = copy.deepcopy(loader.state_dict())
    with pytest.raises((InputError, MismatchError), match=next(iter(change))):
        loader.load_state_dict({**before, **change})
    assert loader.state_dict() == before
    assert len(list(loader)) == 4


@pytest.mark.parametrize("state", [{}, None, 3, [], "state", {"epoch": 0}, {"order": {}, "epoch": 0}])
def test_a_state_that_lacks_something_is_told(cache, state):
    with pytest.raises((InputError, MismatchError)):
        cache.loader(2).load_state_dict(state)


@pytest.mark.parametrize("name", ["epoch", "batches_done", "order"])
def test_a_missing_key_is_named(cache, name):
    loader = cache.loader(2)
    state = {key: value for key, value in loader.state_dict().items() if key != name}
    with pytest.raises(InputError, match=f"without {name}"):
        loader.load_state_dict(state)


def test_a_finished_epoch_and_a_state_from_a_file_are_states(cache):
    loader = cache.loader(2, shuffle=True)
    batches = iter(loader)
    for _ in range(4):
        next(batches)
    state = json.loads(json.dumps(loader.state_dict()))
    assert state["batches_done"] == 4
    other = cache.loader(2, shuffle=True)
    other.load_state_dict({**state, "batches_done": torch.tensor(4)})
    assert list(other) == []
    assert other.epoch == 1


def test_a_child_does_not_wait_for_its_parents_threads(cache):
    loader = cache.loader(2, prefetch=1)
    batches = iter(loader)
    next(batches)
    pid = os.fork()
    if not pid:
        signal.alarm(20)
        try:
            next(batches)
        except InputError as error:
            told = "begun by process" in str(error)
            loader.set_epoch(3)
            os._exit(0 if told and len(list(loader)) == 4 else 1)
        os._exit(2)
    assert os.waitpid(pid, 0)[1] == 0
    assert len(list(batches)) == 3


def test_samples_of_caches_that_do_not_go_together_are_not_mixed(cache, tmp_path):
    write_cache(tmp_path / "float32", LENGTHS, dtype="float32", hidden=32)
    write_cache(tmp_path / "wide", LENGTHS, dtype="bfloat16", hidden=64)
    for name in ("float32", "wide"):
        other = FeatureCache.open(tmp_path / name)
        for samples in ([cache[0], other[0]], [other[0], other[1], cache[0]]):
            with pytest.raises(InputError, match="collate: hidden_states") as told:
                collate(samples)
            assert cache.where in str(told.value)
            assert other.where in str(told.value)
        both = DataLoader(ConcatDataset([cache, other]), batch_size=len(cache) * 2, collate_fn=collate)
        with pytest.raises(InputError, match=str(tmp_path / name)):
            next(iter(both))


def test_samples_with_and_without_captures_are_not_mixed(cache):
    with_capture = cache[0]
    with_capture.last_hidden_states = torch.zeros(1, LENGTHS[0], 32, dtype=torch.bfloat16)
    for samples in ([cache[0], with_capture], [with_capture, cache[1]]):
        with pytest.raises(InputError, match=r"last_hidden_states is .*absent"):
            collate(samples)
