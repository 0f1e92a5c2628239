"""extract, verify, inspect, repair and export with a cache at a URL: the bytes of a cache on a disk."""

from __future__ import annotations

import json
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from commands import start, wait_for, workers_by_fork
from faulty_proxy import CUT_ANSWER, CUT_UPLOAD, ERROR
from jobs import contents
from s3 import SECRET, objects, put, upload_folder

from cache_format import FeatureCache
from cache_format.errors import InputError
from cache_format.layout.manifest import MANIFEST_NAME, Manifest
from cache_format.layout.shard_layout import shard_name
from cache_format.storage import lease, store
from cache_format.storage.lock import LOCK_NAME
from cache_format.storage.store import Store
from cache_format.writing.upload import scratch_folder


def test_the_bytes_of_a_local_run_in_the_order_of_commits(cli, arguments, bucket, s3, proxy, made, tmp_path):
    code, _, err = cli(*arguments)
    assert code == 0, err
    assert objects(s3, bucket) == contents(made)
    assert not [p for p in (tmp_path / "scratch").rglob("*") if p.is_file()], "nothing is left on the disk"
    key = bucket.removeprefix("s3:/")
    puts = [path.partition("?")[0].removeprefix(f"{key}/") for m, path, _ in proxy.requests if m == "PUT"]
    puts = [name for name in puts if name != LOCK_NAME]
    kinds = [name.split("/")[0] for name in puts]
    assert kinds == [
        MANIFEST_NAME,
        *(["samples"] * kinds.count("samples")),
        *(["target"] * kinds.count("target")),
        MANIFEST_NAME,
        *(["shards"] * kinds.count("shards")),
        "index.arrow",
        "shards.arrow",
        MANIFEST_NAME,
    ]
    # Once more: nothing to do, and nothing is written but the lock.
    proxy.requests.clear()
    code, _, err = cli(*arguments)
    assert (code, "already complete" in err) == (0, True)
    assert {path.rsplit("/", 1)[1] for m, path, _ in proxy.requests if m == "PUT"} == {LOCK_NAME}
    assert SECRET not in err


def test_the_scratch_folder_stays_small(arguments, made, bucket, tmp_path):
    most, shards = 0, tmp_path / "scratch"
    job = start(*arguments)
    while job.poll() is None:
        most = max(most, len(list(shards.glob("*/worker-0/shards/*.safetensors"))))
        time.sleep(0.005)
    assert job.returncode == 0, job.stderr.read_text()
    assert 1 <= most <= 3
    assert Manifest.read(made).totals.shards > 5


@pytest.mark.parametrize("lost_scratch", [False, True])
def test_killed_then_resumed(lost_scratch, cli, arguments, bucket, s3, made, tmp_path, proxy):
    job = start(*arguments)
    wait_for(lambda: len([name for name in objects(s3, bucket) if name.startswith("shards/")]) >= 2)
    job.kill()
    job.wait()
    before = objects(s3, bucket)
    assert Manifest.parse(before[MANIFEST_NAME], bucket).state == "extracting"
    finished = {name for name in before if name.startswith("shards/")}
    resumed = [*arguments[:-1], tmp_path / "other"] if lost_scratch else arguments
    proxy.requests.clear()
    code, out, err = cli(*resumed, "--json")
    assert code == 0, err
    assert objects(s3, bucket) == contents(made)
    total = Manifest.read(made).totals.shards
    assert json.loads(out)["run"]["shards"] <= total - len(finished) + 1
    heads = [path for method, path, _ in proxy.requests if method == "HEAD" and "shard-" in path]
    assert len(heads) <= 2 * (total - len(finished)), "finished shards are known from one listing"


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment", ["manifest.json", "samples/", "embeddings", "shard-00003", "index.arrow", "shards.arrow"]
)
def test_killed_while_a_file_goes_up(moment, cli, arguments, bucket, s3, made, proxy):
    came = threading.Event()

    def faults(method, path):
        if method == "PUT" and moment in path:
            came.set()
            time.sleep(1)
        return

    proxy.faults = faults
    job = start(*arguments)
    assert came.wait(60)
    job.kill()
    job.wait()
    proxy.reset()
    code, _, err = cli(*arguments)
    assert code == 0, err
    assert objects(s3, bucket) == contents(made)


def test_through_faults(cli, arguments, bucket, s3, made, proxy):
    number, lock = [0], threading.Lock()

    def faults(method, path):
        with lock:
            number[0] += 1
            kinds = {2: ERROR, 5: CUT_UPLOAD if method == "PUT" else CUT_ANSWER, 8: CUT_ANSWER}
            return kinds.get(number[0] % 11)

    proxy.faults = faults
    code, _, err = cli(*arguments)
    assert code == 0, err
    assert {ERROR, CUT_UPLOAD, CUT_ANSWER} <= set(proxy.met)
    assert objects(s3, bucket) == contents(made)


def test_a_store_that_goes_away_is_told_and_the_job_resumes(cli, arguments, bucket, s3, made, proxy, monkeypatch):
    monkeypatch.setattr(store, "TRIES", 2)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    proxy.faults = lambda method, path: ERROR if "shard-00004" in path else None
    code, _, err = cli(*arguments)
    assert code == 1
    assert f"{bucket}/{shard_name(4)}: cannot write" in err
    assert "InternalError" in err
    assert "Traceback" not in err
    assert SECRET not in err
    assert LOCK_NAME not in objects(s3, bucket)
    proxy.reset()
    assert cli(*arguments)[0] == 0
    assert objects(s3, bucket) == contents(made)


def test_sigterm_leaves_no_lock(arguments, bucket, s3):
    job = start(*arguments)
    wait_for(lambda: any(name.startswith("shards/") for name in objects(s3, bucket)))
    job.send_signal(signal.SIGTERM)
    assert job.wait(15) == 143
    assert LOCK_NAME not in objects(s3, bucket)
    assert "To go on: dflash-cache extract" in job.stderr.read_text()


def test_other_inputs_are_refused_and_nothing_is_touched(cli, arguments, bucket, s3, made, tmp_path):
    upload_folder(s3, bucket, made)
    before = objects(s3, bucket)
    code, _, err = cli(*arguments, "--max-length", "100")
    assert code == 2
    assert "max_length: cache has 256, asked for 100" in err
    assert objects(s3, bucket) == before


def test_a_foreign_place_is_refused(cli, arguments, bucket, s3):
    put(s3, bucket, "thesis.pdf", b"precious")
    code, _, err = cli(*arguments)
    assert (code, "is not empty and not a cache (it has 'thesis.pdf')" in err) == (2, True)
    assert objects(s3, bucket) == {"thesis.pdf": b"precious"}


def test_scratch_of_another_cache_is_not_mixed_in(cli, arguments, job, bucket, s3, made):
    """The cache at the URL was removed and begun anew with other options."""
    code, _, err = cli(*arguments, "--limit", "20")
    assert code == 0, err
    process = start(*arguments, "--limit", "50")
    process.wait()
    assert process.returncode == 2
    for name in objects(s3, bucket):
        Store(bucket).remove(name)
    assert cli(*arguments)[0] == 0
    assert objects(s3, bucket) == contents(made)


def test_two_jobs_on_one_url(cli, arguments, bucket, s3, made, tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.3)
    first = start(*arguments)
    wait_for(lambda: LOCK_NAME in objects(s3, bucket))
    first.send_signal(signal.SIGSTOP)
    try:
        holder = json.loads(objects(s3, bucket)[LOCK_NAME])
        stop = threading.Event()

        def beat():
            for number in range(1000):
                if stop.wait(0.2):
                    return
                put(s3, bucket, LOCK_NAME, json.dumps({**holder, "beat": number}).encode())

        thread = threading.Thread(target=beat)
        thread.start()
        code, _, err = cli(*arguments[:-1], tmp_path / "other")
        stop.set()
        thread.join()
    finally:
        first.send_signal(signal.SIGCONT)
    assert code == 2
    assert f"process {first.pid} on host" in err
    assert first.wait(120) == 0
    assert {k: v for k, v in objects(s3, bucket).items() if k != LOCK_NAME} == contents(made)


def test_two_jobs_that_begin_at_once_agree_on_one_manifest(bucket, tmp_path, made, quick):
    from cache_format.writing.upload import Upload

    manifest = replace(Manifest.read(made), state="preparing")
    other = replace(manifest, identity={**manifest.identity, "max_length": 1})
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    assert Upload(Store(bucket), tmp_path / "a").commit(manifest) == manifest
    assert Upload(Store(bucket), tmp_path / "b").commit(other) == manifest


def test_workers_share_the_job(arguments, bucket, s3, made):
    environments = [{"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0"} for rank in range(2)]
    jobs = [start(*arguments, **environment) for environment in environments]
    for job in jobs:
        assert job.wait(120) == 0, job.stderr.read_text()
    assert objects(s3, bucket) == contents(made)


def test_devices_share_the_job(arguments, bucket, s3, made):
    job = start(*arguments, "--devices", "cpu,cpu", before=workers_by_fork)
    assert job.wait(120) == 0, job.stderr.read_text()
    assert objects(s3, bucket) == contents(made)


def test_quarantine_of_the_whole_job(cli, arguments, bucket, s3):
    """Rows that cannot be prepared leave nothing behind that would refuse the right ones."""
    assert cli(*arguments, "--min-loss-tokens", "100000")[0] == 2
    assert objects(s3, bucket) == {}


def test_urls_that_are_refused(cli, job, tmp_path):
    code, _, err = cli("extract", *job, "--out", f"s3://user:{SECRET}@bucket/cache")
    assert (code, "must not hold credentials" in err, SECRET in err.split("To go on")[0]) == (2, True, False)
    assert cli("extract", *job, "--out", tmp_path / "x", "--scratch", tmp_path)[0] == 2
    assert cli("verify", "ftp://host/cache")[0] == 2


def test_a_default_scratch_folder_is_this_users(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = scratch_folder("s3://bucket/cache")
    assert scratch_folder("s3://bucket/cache") == folder
    assert folder.stat().st_mode & 0o777 == 0o700
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    folder.rmdir()
    folder.symlink_to(elsewhere)
    with pytest.raises(InputError, match="not this user's folder"):
        scratch_folder("s3://bucket/cache")


def test_a_trainer_reads_what_extract_put_there(cli, arguments, bucket, made):
    assert cli(*arguments)[0] == 0
    cache, here = FeatureCache.open(bucket), FeatureCache.open(Path(made))
    assert [batch.input_ids.tolist() for batch in cache.loader(8)] == [b.input_ids.tolist() for b in here.loader(8)]
