"""A folder in a store: what is up is whole and checked; faults of network and store are gone through or told."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from faulty_proxy import CUT_ANSWER, CUT_UPLOAD, ERROR, SILENCE, SLOW
from s3 import SECRET, objects, put

from cache_format import CacheError, InputError, StorageError
from cache_format.errors import StoreError
from cache_format.storage import store
from cache_format.storage.store import PART_BYTES, Store, parse_url
from cache_format.storage.store_file import StoreFile

BIG = np.random.default_rng(0).integers(0, 256, 2 * PART_BYTES + 12345, np.uint8).tobytes()


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(store, "PAUSE_SECONDS", 0.01)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    import s3fs

    monkeypatch.setattr(s3fs.S3FileSystem, "read_timeout", 2)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(BIG)
    return path


def test_list_read_put_move_remove(bucket, s3):
    folder = Store(bucket + "/")
    assert folder.list() == {}
    folder.put("samples/a", b"hello")
    folder.put("b", b"")
    put(s3, bucket.replace("one", "one-more"), "c", b"not in this folder")
    assert folder.list() == {"b": 0, "samples/a": 5}
    assert folder.read("samples/a", 1, 4) == b"ell"
    assert (folder.size("samples/a"), folder.size("samples"), folder.size("c")) == (5, None, None)
    assert folder.get("nothing", 10) is None
    with pytest.raises(CacheError, match="longer than 4 bytes"):
        folder.get("samples/a", 4)
    with pytest.raises(CacheError, match="is missing"):
        folder.read("nothing", 0, 1)
    with pytest.raises(CacheError, match="ends at byte 5"):
        folder.read("samples/a", 3, 9)
    folder.move("samples/a", "quarantine/a")
    assert folder.list() == {"b": 0, "quarantine/a": 5}
    folder.remove("b")
    folder.remove("b")
    assert objects(s3, bucket) == {"quarantine/a": b"hello"}


def test_put_new_is_decided_by_the_store(bucket, proxy, quick):
    first, second = Store(bucket), Store(bucket)
    assert first.put_new("lock", b"mine")
    assert not second.put_new("lock", b"yours")
    assert first.get("lock", 10) == b"mine"
    puts = [headers for method, _, headers in proxy.requests if method == "PUT"]
    assert all(headers.get("If-None-Match") == "*" for headers in puts)
    # The put arrives, its answer does not: the second try finds our own.
    proxy.once(CUT_ANSWER, "PUT", "other")
    assert first.put_new("other", b"mine")
    assert proxy.met == [CUT_ANSWER]


def test_a_large_file_goes_up_in_parts_and_is_checked(bucket, s3, proxy, file):
    Store(bucket).upload(file, "big")
    assert objects(s3, bucket) == {"big": BIG}
    parts = [path for method, path, _ in proxy.requests if method == "PUT" and "partNumber" in path]
    assert len(parts) == 3
    assert not [path for method, path, _ in proxy.requests if method == "GET"], (
        "the etag is compared, nothing read back"
    )


def test_what_the_store_kept_wrongly_is_sent_again_then_told(bucket, s3, monkeypatch, quick, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"right")
    folder, sent = Store(bucket), []
    real = folder._filesystem.put_file

    def wrong_at_first(lpath, rpath, **options):
        sent.append(rpath)
        if len(sent) <= times:
            put(s3, bucket, "a", b"wrong")
        else:
            real(lpath, rpath, **options)

    monkeypatch.setattr(folder._filesystem, "put_file", wrong_at_first)
    times = 1
    folder.upload(path, "a")
    assert objects(s3, bucket) == {"a": b"right"}
    times = 100
    with pytest.raises(StoreError, match=r"a: cannot write: what the store has is not what was sent .* 6 tries"):
        folder.upload(path, "a")


@pytest.mark.parametrize("fault", [ERROR, SILENCE, SLOW, CUT_UPLOAD, CUT_ANSWER])
def test_an_upload_goes_through_faults(fault, bucket, s3, proxy, file, quick):
    """No partial object is ever seen."""
    seen = []

    def faults(method, path):
        seen.append(set(objects(s3, bucket)))
        part = method == "PUT" and "partNumber=2" in path
        return fault if part and fault not in proxy.met else None

    proxy.faults = faults
    Store(bucket).upload(file, "big")
    assert proxy.met == [fault]
    assert objects(s3, bucket) == {"big": BIG}
    assert set() in seen


@pytest.mark.parametrize("fault", [ERROR, SILENCE, SLOW, CUT_ANSWER])
def test_reads_go_through_faults(fault, bucket, s3, proxy, quick, tmp_path):
    put(s3, bucket, "big", BIG)
    folder, out = Store(bucket), np.empty(len(BIG) - 7, np.uint8)
    proxy.once(fault, "GET", "big")
    folder.read_into("big", 7, out)
    assert out.tobytes() == BIG[7:]
    assert proxy.met == [fault]
    proxy.once(fault, "GET", "big", times=2)
    (tmp_path / "copy").touch()
    folder.fetch("big", tmp_path / "copy", len(BIG))
    assert (tmp_path / "copy").read_bytes() == BIG


def test_a_store_that_stays_broken_is_told_with_url_and_code(bucket, proxy, quick, monkeypatch, caplog):
    monkeypatch.setattr(store, "TRIES", 2)
    proxy.faults = lambda method, path: ERROR
    with pytest.raises(StorageError, match=r"s3://.*/a: cannot write: .*InternalError.*after 2 tries") as error:
        Store(bucket).put("a", b"")
    text = f"{error.value!r} {error.value.__cause__!r} {caplog.text}"
    assert error.value.__suppress_context__
    assert SECRET not in text
    again = pickle.loads(pickle.dumps(error.value))
    assert (type(again), str(again)) == (StoreError, str(error.value))


def test_a_bucket_that_is_not_there(bucket, quick):
    with pytest.raises(StoreError, match="no such bucket"):
        Store("s3://no-such-bucket-here/cache").put("a", b"")


def test_without_credentials(bucket, monkeypatch, quick, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(StoreError, match="no credentials; set them as usual"):
        Store(bucket).put("a", b"")


@pytest.mark.parametrize(
    "url", [f"s3://user:{SECRET}@bucket/cache", f"s3://bucket/cache?token={SECRET}", f"s3://bucket/cache#{SECRET}"]
)
def test_credentials_in_a_url_are_refused_and_not_repeated(url):
    with pytest.raises(InputError, match="must not hold credentials") as error:
        Store(url)
    assert SECRET not in str(error.value)


@pytest.mark.parametrize(
    "url", ["ftp://host/cache", "s3://bucket", "s3:///cache", "s3://bucket/a/../b", "file:///tmp/x"]
)
def test_urls_that_cannot_be_a_cache(url):
    with pytest.raises(InputError, match="s3"):
        Store(url)


def test_urls():
    assert parse_url("s3://bucket/a/b/") == "s3://bucket/a/b"
    assert parse_url("hf://datasets/org/name@main/cache") == "hf://datasets/org/name@main/cache"


@pytest.mark.parametrize(("url", "extra"), [("s3://b/c", "s3"), ("gs://b/c", "gcs"), ("hf://datasets/a/b", "hub")])
def test_a_missing_library_is_named_by_its_extra(url, extra, monkeypatch):
    for name in ("s3fs", "gcsfs", "huggingface_hub"):
        monkeypatch.setitem(sys.modules, name, None)
    from fsspec.registry import _registry

    for scheme in ("s3", "gs", "gcs", "hf"):
        monkeypatch.delitem(_registry, scheme, raising=False)
    with pytest.raises(InputError, match=rf"pip install 'dflash-cache\[{extra}\]'"):
        Store(url)


def test_a_fork_connects_anew(bucket):
    folder = Store(bucket)
    folder.put("a", b"hello")
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = 0 if Store.read(folder, "a", 0, 5) == b"hello" else 1
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert pickle.loads(pickle.dumps(folder)).read("a", 0, 5) == b"hello"


def test_what_is_kept_is_read_once(bucket, s3, proxy):
    put(s3, bucket, "big", BIG)
    file = StoreFile(Store(bucket), "big", len(BIG))
    file.keep(len(BIG) - 1000, len(BIG))
    proxy.requests.clear()
    for start in (0, 100, len(BIG) - 1000, len(BIG) - 5, 200):
        out = np.empty(5, np.uint8)
        file.read_into(start, out)
        assert out.tobytes() == BIG[start : start + 5]
    assert [headers["Range"] for _, _, headers in proxy.requests] == [
        "bytes=0-65535",
        f"bytes={len(BIG) - 1000}-{len(BIG) - 1}",
    ]


def test_cache_format_is_light_without_a_store():
    code = "import sys, cache_format; assert not {'s3fs', 'aiohttp', 'botocore', 'huggingface_hub'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
