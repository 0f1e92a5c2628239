"""The loader: what a trainer gets from it, step after step, on one rank or several."""

from __future__ import annotations

import gc
import itertools
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from synthetic import states_of, write_cache
from torch.utils.data import DataLoader

from cache_format import CacheError, DFlashTargetBatch, FeatureCache, InputError, MismatchError, collate
from cache_format.reading.buffer_pool import BufferPool

HIDDEN = 256
LENGTHS = [5, 31, 12, 1, 17, 9, 26, 8, 40, 3, 22, 14, 6, 19, 2, 33, 11, 28, 7]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("loader") / "cache"
    write_cache(path, LENGTHS, dtype="bfloat16", hidden=HIDDEN)
    return path


@pytest.fixture
def cache(path):
    return FeatureCache.open(path)


def which(cache: FeatureCache, batch: DFlashTargetBatch) -> list[int]:
    """Which samples a batch holds, told by the bits of their states (the cache's are random)."""
    known = {
        states_of(i, n, "bfloat16", 3 * HIDDEN)[0].view(torch.int16).numpy().tobytes(): i for i, n in enumerate(LENGTHS)
    }
    return [known[row[0].view(torch.int16).numpy().tobytes()] for row in batch.hidden_states]


def equal(a: DFlashTargetBatch, b: DFlashTargetBatch) -> bool:
    return all(
        (x is None and y is None) or (x.dtype == y.dtype and torch.equal(x, y))
        for x, y in zip(vars(a).values(), vars(b).values(), strict=True)
    )


@pytest.mark.parametrize("threads", [1, 4])
def test_batches_are_those_of_the_reader(cache, threads):
    for batch in cache.loader(3, shuffle=True, threads=threads):
        assert equal(batch, collate([cache[i] for i in which(cache, batch)]))
        assert batch.input_ids.dtype == batch.attention_mask.dtype == batch.loss_mask.dtype == torch.int64


@pytest.mark.parametrize("options", [{"batch_size": 4}, {"batch_tokens": 64}])
@pytest.mark.parametrize("shuffle", [False, True, "window"])
def test_every_sample_once_over_the_ranks(cache, options, shuffle):
    seen = []
    for rank in range(3):
        loader = cache.loader(**options, shuffle=shuffle, window_shards=2, rank=rank, world_size=3)
        steps = len(loader)
        batches = [which(cache, batch) for batch in loader]
        assert len(batches) == steps
        seen += itertools.chain(*batches)
    assert sorted(seen) == list(range(len(LENGTHS)))


def test_epochs_differ_and_repeat(cache):
    loader = cache.loader(4, shuffle=True)
    first, second = ([which(cache, b) for b in loader] for _ in range(2))
    assert first != second
    assert loader.epoch == 2
    loader.set_epoch(0)
    assert [which(cache, b) for b in loader] == first
    assert [which(cache, b) for b in cache.loader(4, shuffle=True, threads=1, prefetch=1)] == first


def test_an_iteration_broken_off_starts_again(cache):
    loader = cache.loader(4, shuffle=True)
    first = [which(cache, b) for b in itertools.islice(loader, 2)]
    assert [which(cache, b) for b in loader][:2] == first


@pytest.mark.parametrize("options", [{"batch_size": 2}, {"batch_tokens": 48}, {"batch_size": 2, "pack_to": 48}])
def test_resume_within_an_epoch_is_exact_on_any_number_of_ranks(cache, options):
    def tokens(batch):
        return batch.input_ids[batch.attention_mask.bool()].tolist()

    whole = [tokens(b) for b in cache.loader(**options, shuffle=True)]
    begun, states = [], []
    for rank in range(2):
        loader = cache.loader(**options, shuffle=True, rank=rank, world_size=2)
        begun += [tokens(b) for b in itertools.islice(loader, 2)]
        states.append(loader.state_dict())
    assert states[0] == states[1]
    resumed = cache.loader(**options, shuffle=True, threads=2)
    resumed.load_state_dict(states[0])
    resumed.set_epoch(states[0]["epoch"])
    rest = [tokens(b) for b in resumed]
    assert rest == whole[4:]
    assert sorted(begun) == sorted(whole[:4])
    assert resumed.state_dict()["epoch"] == 1
    assert resumed.state_dict()["batches_done"] == 0
    assert len([*resumed]) == len(whole) or options.get("batch_tokens") or options.get("pack_to")


def test_state_counts_batches_given_out_not_those_read_ahead(cache):
    loader = cache.loader(2, prefetch=6)
    next(iter(loader))
    assert loader.state_dict()["batches_done"] == 1


def test_a_state_of_another_order_is_refused(cache):
    state = cache.loader(2, shuffle=True, seed=1).state_dict()
    for other in ({"seed": 2}, {"shuffle": False}, {"max_length": 4}, {"filter": lambda i: i.num_tokens > 4}):
        loader = cache.loader(2, **{"shuffle": True, "seed": 1, **other})
        with pytest.raises(MismatchError, match="samples" if "filter" in other else next(iter(other))):
            loader.load_state_dict(state)


def test_max_length_and_filter(cache):
    batches = list(cache.loader(4, max_length=10, filter=lambda index: index.num_tokens >= 8))
    ids = [i for b in batches for i in which(cache, b)]
    assert ids == [i for i, n in enumerate(LENGTHS) if n >= 8]
    assert max(b.input_ids.shape[1] for b in batches) == 10
    for batch in batches:
        for row, i in enumerate(which(cache, batch)):
            assert torch.equal(batch.hidden_states[row, :10][: LENGTHS[i]], cache[i].hidden_states[0, :10])


def test_packing_keeps_samples_apart(cache):
    seen = []
    for batch in cache.loader(2, pack_to=48, shuffle=True):
        for row in range(len(batch.input_ids)):
            assert int(batch.seq_lens[row].sum()) == 48
            real = int(batch.attention_mask[row].sum())
            at = 0
            for size in batch.seq_lens[row].tolist():
                if at >= real:
                    break
                span = slice(at, at + size)
                states = batch.hidden_states[row, span]
                i = next(i for i, n in enumerate(LENGTHS) if n == size)
                assert torch.equal(states, states_of(i, size, "bfloat16", 3 * HIDDEN))
                assert torch.equal(batch.input_ids[row, span], cache[i].input_ids[0])
                assert torch.equal(batch.loss_mask[row, span], cache[i].loss_mask[0])
                assert batch.position_ids[row, span].tolist() == list(range(size))
                assert batch.doc_remaining[row, span].tolist() == list(range(size - 1, -1, -1))
                seen.append(i)
                at += size
            assert not batch.doc_remaining[row, real:].any()
            assert not batch.hidden_states[row, real:].any()
    assert sorted(seen) == list(range(len(LENGTHS)))


def test_a_batch_stays_valid_while_any_of_it_is_held(cache):
    loader = cache.loader(2, shuffle=True, prefetch=1)
    views, copies = [], []
    for _ in range(3):
        for batch in loader:
            views.append(batch.hidden_states[0, -1:])
            copies.append(views[-1].clone())
    del batch
    gc.collect()
    assert all(torch.equal(a, b) for a, b in zip(views, copies, strict=True))


def test_memory_comes_back_and_is_bounded():
    pool = BufferPool(1 << 12, keep=2)
    first = pool.lease(100)
    place = first.data_ptr()
    view = first[10:20]
    del first
    other = pool.lease(100)
    assert other.data_ptr() != place
    del view
    assert pool.lease(100).data_ptr() == place
    held = [pool.lease(10) for _ in range(5)]
    del held, other
    assert len(pool._free) == 2
    assert pool.lease(1 << 13).numel() == 1 << 13


def test_the_loader_holds_no_more_batches_than_it_says(cache):
    loader = cache.loader(1, prefetch=3, threads=2)
    lent: list[int] = []
    lease = loader._pool.lease
    loader._pool.lease = lambda size: lent.append(size) or lease(size)  # type: ignore[method-assign]
    for given, _ in enumerate(loader, 1):
        assert len(lent) <= given + 3


def test_threads_end_with_the_iteration(cache):
    for _ in cache.loader(2, threads=3):
        break
    gc.collect()
    for thread in threading.enumerate():
        if thread.name.startswith("cache-reader"):
            thread.join(timeout=5)
            assert not thread.is_alive()


def test_verify_sample_works_in_the_loader(tmp_path):
    path = tmp_path / "cache"
    write_cache(path, LENGTHS, dtype="bfloat16")
    cache = FeatureCache.open(path, verify="sample")
    assert sum(len(b.input_ids) for b in cache.loader(4)) == len(LENGTHS)
    shard, start, _ = cache._source.locate(8)
    offset, _ = shard.file.row_range("hidden_states", start + 39, start + 40)
    with open(shard.file.where, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
    for options in ({}, {"max_length": 4}):
        with pytest.raises(CacheError, match="sample 8 does not match its checksum"):
            list(FeatureCache.open(path, verify="sample").loader(4, **options))
    assert len(list(FeatureCache.open(path).loader(4))) == 5


def test_a_shard_that_vanishes_is_an_error_of_the_step(tmp_path):
    path = tmp_path / "cache"
    write_cache(path, LENGTHS, dtype="bfloat16", hidden=HIDDEN)
    cache = FeatureCache.open(path)
    (path / "shards" / "shard-00001.safetensors").unlink()
    with pytest.raises(CacheError, match=r"shard-00001.safetensors: is missing"):
        list(cache.loader(4))


@pytest.mark.parametrize("options", [{}, {"batch_size": 2, "batch_tokens": 9}, {"batch_tokens": 9, "pack_to": 9}])
def test_batch_size_or_batch_tokens(cache, options):
    with pytest.raises(InputError, match="batch_size="):
        cache.loader(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_tokens": 39}, "max_length=39"),
        ({"batch_size": 1, "pack_to": 39}, "max_length=39"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 2, "threads": 0}, "threads is 0"),
        ({"batch_size": 2, "seed": -1}, "seed is -1"),
        ({"batch_size": 2, "shuffle": "some"}, "window"),
        ({"batch_size": 2, "shuffle": 1}, "shuffle is 1"),
        ({"batch_size": 2, "seed": 1.5}, "seed is 1.5"),
        ({"batch_size": 2, "device": "gpu"}, "not a torch device"),
        ({"batch_size": 2, "world_size": 2}, "without rank="),
        ({"batch_size": 10, "world_size": 2, "rank": 0, "drop_last": True}, "drop_last"),
        ({"batch_size": 2, "rank": 2, "world_size": 2}, "rank 2"),
        ({"batch_size": 2, "world_size": 99, "rank": 0}, "cannot be divided"),
        ({"batch_size": 2, "filter": lambda index: index.num_tokens}, "a bool for each"),
        ({"batch_size": 2, "filter": lambda index: index.num_tokens > 99}, "filter= leaves none of the 19 samples"),
    ],
)
def test_options_that_cannot_be_are_refused_at_once(cache, options, message):
    with pytest.raises(InputError, match=message):
        cache.loader(**options)


def test_no_epoch_below_zero(cache):
    with pytest.raises(InputError, match="epoch is -1"):
        cache.loader(2).set_epoch(-1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_cuda_is_refused_at_once(cache):
    with pytest.raises(InputError, match="no CUDA device"):
        cache.loader(2, device="cuda")


def test_batches_are_where_they_are_wanted(cache):
    batch = next(iter(cache.loader(2, device="meta")))
    assert all(tensor.device.type == "meta" for tensor in vars(batch).values() if tensor is not None)


@pytest.mark.parametrize("options", [{"batch_size": 10**12}, {"batch_tokens": 10**15}])
def test_a_batch_larger_than_the_cache_takes_no_more_memory_than_the_cache(cache, options):
    [batch] = cache.loader(**options)
    assert len(batch.input_ids) == len(LENGTHS)


def test_a_worker_forked_while_a_reader_thread_is_in_the_cache(cache):
    """Its copy of the lock is held by a thread that it does not have."""
    with cache._source.opened._lock:
        pid = os.fork()
        if not pid:
            signal.alarm(5)
            os._exit(0 if len(cache.batch([0, 1]).input_ids) == 2 else 1)
    assert os.waitpid(pid, 0)[1] == 0


def test_a_process_that_ends_in_the_middle_of_an_epoch_says_nothing(cache):
    code = (
        "import sys; from cache_format import FeatureCache; "
        "batches = iter(FeatureCache.open(sys.argv[1]).loader(2, shuffle=True)); next(batches)"
    )
    run = subprocess.run([sys.executable, "-c", code, cache.path], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")


def test_ranks_come_from_the_environment(cache, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert len(cache.loader(2)) == 5
    both = [which(cache, b) for rank in (0, 1) for b in cache.loader(1, rank=rank)]
    assert sorted(i for ids in both for i in ids) == list(range(len(LENGTHS)))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_plain_dataloader(cache, workers):
    loader = DataLoader(cache, batch_size=4, shuffle=True, num_workers=workers, collate_fn=collate)
    seen = [i for batch in loader for i in which(cache, batch)]
    assert sorted(seen) == list(range(len(LENGTHS)))
    assert isinstance(batch := next(iter(loader)), DFlashTargetBatch)
    assert equal(batch, cache.batch(which(cache, batch)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_on_a_cuda_device(cache):
    for _ in range(3):
        for batch in cache.loader(3, shuffle=True, device="cuda", prefetch=1):
            assert batch.hidden_states.is_cuda
            host = batch.to("cpu")
            assert equal(host, collate([cache[i] for i in which(cache, host)]))


def test_float_sums_do_not_hide_the_order(cache):
    """Two loaders with the same options give the same tensors, bit for bit, in the same order."""
    one, two = (list(cache.loader(batch_tokens=64, shuffle=True, seed=3, threads=t)) for t in (1, 4))
    assert all(equal(a, b) for a, b in zip(one, two, strict=True))
    assert np.all([len(a.input_ids) for a in one])
