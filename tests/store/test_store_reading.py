"""A cache at a URL gives what the same cache on a disk gives: by range, and through a bounded cache of whole shards."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import threading
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from faulty_proxy import CUT_ANSWER, ERROR
from s3 import SECRET, objects, put, upload_folder
from synthetic import write_cache

from cache_format import CacheError, FeatureCache, InputError, collate
from cache_format.layout.shard_layout import shard_name
from cache_format.storage import store
from cache_format.storage.shard_cache import ShardCache

LENGTHS = [1, 5, 2, 9, 4, 7, 3, 8, 6, 40, 33, 25, 60, 71, 82, 90, 17, 28, 55, 64] * 6


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("local") / "cache"
    write_cache(path, LENGTHS, dtype="bfloat16")
    return path


@pytest.fixture
def url(local, bucket, s3, proxy, monkeypatch) -> str:
    upload_folder(s3, bucket, local)
    monkeypatch.setattr(store, "PAUSE_SECONDS", 0.01)
    return bucket


def same(a, b) -> bool:
    pairs = [(getattr(a, field.name), getattr(b, field.name)) for field in fields(a)]
    return all(x is y is None or (x.dtype == y.dtype and torch.equal(x, y)) for x, y in pairs)


def bytes_in(folder: Path) -> int:
    """While other threads write and remove."""
    total = 0
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def check_all(cache: FeatureCache, local: Path) -> None:
    here = FeatureCache.open(local)
    assert len(cache) == len(here)
    assert all(same(cache[i], here[i]) for i in (0, 7, -1))
    assert same(cache.batch([3, 50, 2, 3]), here.batch([3, 50, 2, 3]))
    for options in ({"batch_size": 8}, {"batch_tokens": 256, "shuffle": True}, {"batch_size": 2, "pack_to": 128}):
        for a, b in zip(cache.loader(**options), here.loader(**options), strict=True):
            assert same(a, b)
    assert torch.equal(cache.get_input_embeddings().weight, here.get_input_embeddings().weight)
    assert torch.equal(cache.get_output_embeddings().weight, here.get_output_embeddings().weight)


def test_by_range(url, local, proxy):
    cache = FeatureCache.open(url, verify="sample", expect={"dtype": "bfloat16"})
    assert url in repr(cache)
    check_all(cache, local)
    whole = [h for m, path, h in proxy.requests if m == "GET" and "shard-" in path and "Range" not in h]
    assert not whole, "shards are read by range"


def test_a_sample_is_one_range_and_its_shard_two(bucket, s3, proxy, tmp_path):
    write_cache(tmp_path / "cache", LENGTHS, dtype="bfloat16", hidden=256, shard_bytes=1 << 20)
    upload_folder(s3, bucket, tmp_path / "cache")
    cache = FeatureCache.open(bucket)
    cache[0]
    proxy.requests.clear()
    shard = int(cache.index.shard[0])
    others = np.flatnonzero(cache.index.shard == shard)[1:4].tolist()
    cache.batch(others)
    assert len([1 for _, path, _ in proxy.requests if "shard-" in path]) == len(others)
    proxy.requests.clear()
    other = int(np.flatnonzero(cache.index.shard != shard)[0])
    cache.batch([other])
    assert len([1 for _, path, _ in proxy.requests if "shard-" in path]) <= 3


def test_own_memory_by_range(url):
    cache = FeatureCache.open(url)
    first = cache[0]
    kept = first.hidden_states.clone()
    first.hidden_states.zero_()
    assert torch.equal(cache[0].hidden_states, kept)


def test_through_a_local_cache(url, local, proxy, tmp_path):
    cache = FeatureCache.open(url, cache_dir=tmp_path / "shards")
    check_all(cache, local)
    proxy.requests.clear()
    check_all(FeatureCache.open(url, cache_dir=tmp_path / "shards"), local)
    assert not [path for _, path, _ in proxy.requests if not path.endswith("manifest.json")], "all but it is there"


def test_the_local_cache_is_bounded(url, local, tmp_path):
    sizes = [(local / shard_name(n)).stat().st_size for n in range(5)]
    limit = 3 * max(sizes)
    folder = tmp_path / "shards" / "shards"
    cache = FeatureCache.open(url, cache_dir=tmp_path / "shards", cache_limit=limit)
    assert cache.manifest.totals.shards > 6
    for a, b in zip(cache.loader(4, shuffle=True), FeatureCache.open(local).loader(4, shuffle=True), strict=True):
        assert same(a, b)
        assert bytes_in(folder) <= limit
    assert not list(folder.glob("*.tmp"))
    removed = [n for n, shard in cache._source.opened._open.items() if shard.is_removed]
    assert len(removed) <= 4, "what was removed is not held open for long"


def test_a_limit_below_a_shard_is_refused(url, tmp_path):
    cache = FeatureCache.open(url, cache_dir=tmp_path, cache_limit=1000)
    with pytest.raises(InputError, match="cache_limit=1,000 bytes: a shard has"):
        cache[0]
    with pytest.raises(InputError, match="goes with cache_dir="):
        FeatureCache.open(url, cache_limit=1000)


def test_cache_dir_is_for_urls(local, tmp_path):
    with pytest.raises(InputError, match="for a cache at a URL"):
        FeatureCache.open(local, cache_dir=tmp_path)


def test_the_window_shuffle_finds_its_shards_there(url, local, tmp_path, proxy):
    cache = FeatureCache.open(url, cache_dir=tmp_path)
    asked = []
    real = cache._source.read_ahead
    cache._source.read_ahead = lambda number: (asked.append(number), real(number))
    loader = cache.loader(4, shuffle="window", window_shards=2, seed=3)
    here = FeatureCache.open(local).loader(4, shuffle="window", window_shards=2, seed=3)
    for batch, expected in zip(loader, here, strict=True):
        assert same(batch, expected)
    batches = loader._plan(0)
    order = list(dict.fromkeys(cache.index.shard[batches.samples].tolist()))
    assert sorted(asked) == sorted(order)
    gets = [path for _, path, headers in proxy.requests if "shard-" in path and "=0-" in headers.get("Range", "")]
    assert len(gets) == len(set(gets)) == len(order), "each shard is downloaded once"


def _read_all(url, cache_dir, limit, out):
    cache = FeatureCache.open(url, cache_dir=cache_dir, cache_limit=limit)
    out.put(sum(float(batch.hidden_states.float().sum()) for batch in cache.loader(8, shuffle=True)))


def test_processes_share_the_local_cache(url, local, tmp_path):
    limit = 4 * max((local / shard_name(n)).stat().st_size for n in range(5))
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    workers = [context.Process(target=_read_all, args=(url, tmp_path, limit, out)) for _ in range(2)]
    for worker in workers:
        worker.start()
    sums = [out.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
    here = FeatureCache.open(local).loader(8, shuffle=True)
    expected = sum(float(batch.hidden_states.float().sum()) for batch in here)
    assert sums == [expected, expected]


def test_what_a_killed_download_left_is_cleared(tmp_path):
    folder = ShardCache(tmp_path, 250)
    left = tmp_path / ".one.0123abcd.tmp"
    left.write_bytes(b"x" * 200)
    file = folder.get("two.safetensors", 100, lambda path: path.write_bytes(b"y" * 100))
    assert not left.exists()
    folder.get("three.safetensors", 200, lambda path: path.write_bytes(b"z" * 200))
    assert sorted(p.name for p in tmp_path.glob("*.safetensors")) == ["three.safetensors"]
    out = np.empty(100, np.uint8)
    file.read_into(0, out)
    assert out.tobytes() == b"y" * 100, "an open file stays readable"


def test_a_failed_download_leaves_nothing(tmp_path):
    def fail(path):
        raise CacheError("s3://there", "is missing")

    with pytest.raises(CacheError, match="is missing"):
        ShardCache(tmp_path, None).get("one.safetensors", 10, fail)
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ".lock"] == []


def test_threads_download_a_shard_once(tmp_path):
    made = []

    def fill(path):
        made.append(path)
        path.write_bytes(b"a" * 10)

    folder = ShardCache(tmp_path, None)
    threads = [threading.Thread(target=lambda: folder.get("one.safetensors", 10, fill)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("cached", [False, True])
def test_dataloader_workers(method, cached, url, local, tmp_path):
    cache = FeatureCache.open(url, **({"cache_dir": tmp_path} if cached else {}))
    cache[0]
    loader = torch.utils.data.DataLoader(
        cache, batch_size=40, collate_fn=collate, num_workers=1, multiprocessing_context=method
    )
    here = FeatureCache.open(local)
    for number, batch in enumerate(loader):
        assert same(batch, collate([here[i] for i in range(number * 40, number * 40 + 40)]))


def test_pickling_takes_the_small_files_along(url, proxy):
    cache = FeatureCache.open(url)
    proxy.requests.clear()
    again = pickle.loads(pickle.dumps(cache))
    assert not [path for _, path, _ in proxy.requests if "arrow" in path]
    assert same(again[1], cache[1])


def test_temporary_files_go_with_the_cache(url):
    cache = FeatureCache.open(url)
    folder = cache.path
    assert folder.is_dir()
    del cache
    assert not folder.exists()


def test_faults_on_the_way(url, local, proxy):
    number, lock = [0], threading.Lock()

    def faults(method, path):
        with lock:
            number[0] += 1
            return {0: ERROR, 3: CUT_ANSWER}.get(number[0] % 7)

    proxy.faults = faults
    check_all(FeatureCache.open(url), local)
    assert {ERROR, CUT_ANSWER} <= set(proxy.met)


def flip(s3, url, name, at):
    data = bytearray(objects(s3, url)[name])
    data[at] ^= 1
    put(s3, url, name, bytes(data))


def test_damage_is_found(url, s3, local, tmp_path):
    cache = FeatureCache.open(url, verify="sample")
    flip(s3, url, shard_name(0), (local / shard_name(0)).stat().st_size // 2)
    places = np.flatnonzero(cache.index.shard == 0).tolist()
    for open_again in ({"verify": "sample"}, {"cache_dir": tmp_path}):
        damaged = FeatureCache.open(url, **open_again)
        with pytest.raises(CacheError, match=rf"{url}/shards/shard-00000.safetensors: sample \d+ does not match"):
            damaged.batch(places)
    flip(s3, url, "index.arrow", 1000)
    with pytest.raises(CacheError, match=rf"{url}/index.arrow: does not match its checksum"):
        FeatureCache.open(url)


def test_a_table_of_another_size_is_not_downloaded(url, s3, proxy):
    put(s3, url, "index.arrow", b"x" * (8 << 20))
    proxy.requests.clear()
    with pytest.raises(CacheError, match="does not match its checksum"):
        FeatureCache.open(url)
    assert not [path for method, path, _ in proxy.requests if method == "GET" and path.endswith("index.arrow")]


def test_embeddings_are_checked(url, s3):
    flip(s3, url, "target/embeddings.safetensors", -1)
    with pytest.raises(CacheError, match=r"embeddings\.safetensors: does not match its checksum"):
        FeatureCache.open(url).get_input_embeddings()


def test_missing_things(url, s3, bucket):
    name, _, prefix = url.removeprefix("s3://").partition("/")
    cache = FeatureCache.open(url)
    s3.delete_object(Bucket=name, Key=f"{prefix}/{shard_name(0)}")
    with pytest.raises(CacheError, match=r"shard-00000.safetensors: is missing"):
        cache.batch(np.flatnonzero(cache.index.shard == 0).tolist())
    with pytest.raises(CacheError, match="is not a feature cache"):
        FeatureCache.open(bucket + "/elsewhere")


def test_no_secret_in_what_is_shown_or_pickled(url):
    cache = FeatureCache.open(url)
    assert os.environ["AWS_SECRET_ACCESS_KEY"] == SECRET
    assert SECRET not in repr(cache) + repr(pickle.dumps(cache)) + str(cache.manifest)
