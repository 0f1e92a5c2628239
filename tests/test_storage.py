"""Paths stay inside the cache; a commit is whole or not there; one process writes at a time."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from cache_format.errors import CacheError, StorageError
from cache_format.storage.commit import committed, make_folder, remove_temporaries
from cache_format.storage.lock import LOCK_NAME, LockedError, writing
from cache_format.storage.paths import inside


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "", ".", "a//b", "a\\b", "a\0b", "a/.."])
def test_names_that_lead_out_of_the_cache_are_refused(tmp_path, name):
    with pytest.raises(CacheError):
        inside(tmp_path, name)


def test_a_symbolic_link_out_of_the_cache_is_refused(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "secret").write_text("x")
    (tmp_path / "cache" / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(CacheError, match="symbolic link"):
        inside(tmp_path / "cache", "link")
    (tmp_path / "cache" / "folder").symlink_to(tmp_path)
    with pytest.raises(CacheError, match="symbolic link"):
        inside(tmp_path / "cache", "folder/secret")
    (tmp_path / "cache" / "other").symlink_to("shards")
    assert inside(tmp_path / "cache", "other/a") == tmp_path / "cache" / "other/a"
    assert inside(tmp_path / "cache", "shards/a").name == "a"


def test_a_commit_replaces_the_file_at_its_end_and_not_before(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"old")
    with committed(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["f"]


def test_a_failed_commit_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"old")
    with pytest.raises(StorageError, match="disk is full") as error, committed(path) as file:
        file.write(b"ne")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert error.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["f"]


def test_what_a_killed_process_left_is_removed(tmp_path):
    code = (
        "import os, pathlib, signal\n"
        "from cache_format.storage.commit import committed\n"
        f"with committed(pathlib.Path({str(tmp_path / 'f')!r})) as file:\n"
        "    file.write(b'half'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 1
    assert not (tmp_path / "f").exists()
    remove_temporaries(tmp_path)
    assert os.listdir(tmp_path) == []


def test_folders_are_made_with_their_parents(tmp_path):
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        make_folder(tmp_path / "file" / "b")


HOLD = (
    "import pathlib, sys, time\n"
    "from cache_format.storage.lock import writing\n"
    "with writing(pathlib.Path(sys.argv[1])):\n"
    "    print('held', flush=True); time.sleep(60)\n"
)


def test_the_lock_names_its_holder_and_dies_with_it(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(LockedError, match=f"process {holder.pid} on host .*since"), writing(tmp_path):
        pass
    holder.kill()
    holder.wait()
    with writing(tmp_path):
        assert os.listdir(tmp_path) == [".lock"]
    assert os.listdir(tmp_path) == []


SHARE = (
    "import pathlib, sys, time\n"
    "from cache_format.storage.lock import LockedError, writing\n"
    "try:\n"
    "    with writing(pathlib.Path(sys.argv[1]), job=sys.argv[2]):\n"
    "        print('held', flush=True); sys.stdin.read()\n"
    "except LockedError as error:\n"
    "    print('refused', flush=True)\n"
)


def test_workers_of_one_job_share_the_lock_and_others_are_refused(tmp_path):
    def start(job: str) -> subprocess.Popen:
        command = [sys.executable, "-c", SHARE, str(tmp_path), job]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    workers = [start("one") for _ in range(4)]
    assert [w.stdout.readline() for w in workers] == ["held\n"] * 4
    other = start("two")
    assert other.communicate()[0] == "refused\n"
    with pytest.raises(LockedError), writing(tmp_path):
        pass
    workers[0].kill()
    for worker in workers[1:]:
        worker.communicate()
    with writing(tmp_path, job="two"):
        pass
    assert os.listdir(tmp_path) == []


def test_a_worker_waits_while_the_first_of_its_job_begins_on_a_slow_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("cache_format.storage.lock._UNKNOWN_SECONDS", 0.1)
    alone, done = threading.Event(), threading.Event()

    def begin():
        alone.set()
        time.sleep(0.5)
        done.set()

    def first():
        with writing(tmp_path, job="one", first=begin):
            joined.wait(10)

    joined, worker = threading.Event(), threading.Thread(target=first)
    worker.start()
    alone.wait()
    with pytest.raises(LockedError), writing(tmp_path, job="two"):
        pass
    assert not done.is_set(), "another job is refused at once"
    with writing(tmp_path, job="one"):
        assert done.is_set()
    joined.set()
    worker.join()


def lock_as_link(cache):
    (cache / LOCK_NAME).symlink_to(cache.parent / "precious")


def lock_as_dangling_link(cache):
    (cache / LOCK_NAME).symlink_to(cache.parent / "not-there")


def lock_as_loop(cache):
    (cache / LOCK_NAME).symlink_to(LOCK_NAME)


def lock_as_hard_link(cache):
    os.link(cache.parent / "precious", cache / LOCK_NAME)


def lock_as_pipe(cache):
    os.mkfifo(cache / LOCK_NAME)


@pytest.mark.parametrize("attack", [lock_as_link, lock_as_dangling_link, lock_as_loop, lock_as_hard_link, lock_as_pipe])
def test_a_lock_that_is_another_file_is_refused_and_not_written_to(tmp_path, attack):
    cache = tmp_path / "cache"
    cache.mkdir()
    (tmp_path / "precious").write_bytes(b"precious")
    attack(cache)
    with pytest.raises(CacheError, match=r"\.lock: is .*; remove it"), writing(cache):
        pass
    assert sorted(os.listdir(tmp_path)) == ["cache", "precious"]
    assert (tmp_path / "precious").read_bytes() == b"precious"


def test_a_lock_that_says_nonsense_is_held_all_the_same(tmp_path):
    (tmp_path / LOCK_NAME).write_text("[" * 4096)
    with writing(tmp_path):
        (tmp_path / LOCK_NAME).write_text("[" * 4096)
        with pytest.raises(LockedError, match="another process is writing"), writing(tmp_path):
            pass


def test_a_loop_of_links_is_told_from_what_is_not_there_yet(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("shards")
    for name in ("loop", "loop/a", "x" * 300):
        with pytest.raises(CacheError, match="cannot be followed"):
            inside(tmp_path, name)
    for name in ("shards", "shards/a", "dangling", "dangling/a"):
        assert inside(tmp_path, name) == tmp_path / name
