"""Two commands that choose one OUT at the same moment: the later one finds what the other made, and leaves it."""

from __future__ import annotations

import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import commands
import numpy as np
import pytest
import torch
from jobs import contents

from cache_format.errors import InputError
from cache_format.export.vocab_map import vocab_map, write_vocab_map
from cache_format.layout.follow_files import (
    KeptWindow,
    forget_window,
    read_done,
    read_window,
    write_done,
    write_window,
)
from cache_format.storage import own_folders
from cache_format.storage.lock import writing
from cache_format.storage.own_folders import empty_but_for_lock, refuse_foreign
from cache_format.upkeep.verify import verify
from extractor.job.folder_destination import FolderDestination


def test_a_folder_that_is_begun_while_it_is_looked_at_is_not_foreign(tmp_path, monkeypatch):
    """The marker comes first, then the rest; whoever looks in between may see any of it."""

    def listed(folder):
        (folder / "manifest.json").write_text("{}")
        (folder / "anything").mkdir()
        return os.listdir(folder)

    monkeypatch.setattr(own_folders, "os", type("os", (), {"listdir": staticmethod(listed), "path": os.path}))
    refuse_foreign(tmp_path, "a cache", "manifest.json", ["shards"])


def test_a_folder_of_somebody_else_is_foreign(tmp_path):
    for name in ("shards", ".lock", ".x.1234.tmp"):
        (tmp_path / name).touch()
    refuse_foreign(tmp_path, "a cache", "manifest.json", ["shards"])
    refuse_foreign(tmp_path / "not there", "a cache", "manifest.json", ["shards"])
    (tmp_path / ".bashrc").touch()
    with pytest.raises(InputError, match=r"^--out .* is not empty and not a cache \(it has '.bashrc'\)"):
        refuse_foreign(tmp_path, "a cache", "manifest.json", ["shards"], "--out")
    with pytest.raises(InputError, match="is a file"):
        refuse_foreign(tmp_path / ".bashrc", "a cache", "manifest.json", [])


FEW = ["--to", "specforge", "--yes", "--layers", "0,2"]


@pytest.mark.parametrize(
    ("module", "command", "first", "second"),
    [
        ("cache_format.upkeep.recode", "recode", ["--codec", "zbits"], ["--codec", "fp8"]),
        ("cache_format.export.write_export", "export", FEW, FEW[:-2]),
    ],
)
def test_another_that_ends_before_the_lock_is_held(made, cli, tmp_path, monkeypatch, module, command, first, second):
    out, before = tmp_path / "out", {}
    locked = __import__(module, fromlist=["writing"]).writing

    @contextmanager
    def late(folder):
        commands.made(command, made, out, *first)
        before.update(contents(out))
        with locked(folder) as held:
            yield held

    monkeypatch.setattr(f"{module}.writing", late)
    code, _, err = cli(command, made, out, *second)
    assert (code, "Different" in err or "differ" in err) == (2, True), err
    assert before
    assert contents(out) == before


def test_an_export_that_ends_before_an_extraction_holds_the_lock(made, small_job, cli, tmp_path, monkeypatch):
    out, before, held = tmp_path / "out", {}, FolderDestination.held

    @contextmanager
    def late(self):
        commands.made("export", made, out, *FEW)
        before.update(contents(out))
        with held(self):
            yield

    monkeypatch.setattr(FolderDestination, "held", late)
    code, _, err = cli(*small_job, "--out", out)
    assert (code, "is not empty and not a cache (it has 'export.json')" in err) == (2, True), err
    assert before
    assert contents(out) == before, "a lock neither"


@pytest.mark.parametrize("name", ["shards/shard-00001.safetensors", "index.arrow"])
def test_a_repair_of_what_another_has_mended_meanwhile_touches_nothing(made, job, cli, tmp_path, monkeypatch, name):
    cache = shutil.copytree(made, tmp_path / "cache")
    data = bytearray((cache / name).read_bytes())
    data[-20] ^= 1
    (cache / name).write_bytes(data)

    def looked_at_for_hours(*arguments, **options):
        found = verify(*arguments, **options)
        commands.run("repair", cache, "--yes")
        commands.made("extract", *job, "--out", cache)
        return found

    monkeypatch.setattr("cache_format.upkeep.verify.verify", looked_at_for_hours)
    code, _, err = cli("repair", cache, "--yes")
    assert (code, f"{name} changed while" in err or "index.arrow changed while" in err) == (2, True), err
    assert "nothing was touched" in err
    quarantined = cache / "quarantine"
    assert len(list(quarantined.iterdir())) in (1, 3), "what the other one set aside"
    shutil.rmtree(quarantined)
    assert contents(cache) == contents(made)


def test_a_lock_in_a_folder_that_its_holders_remove(tmp_path):
    folder, inside = tmp_path / "a" / "scratch", []

    def work(number: int) -> None:
        for _ in range(60):
            with writing(folder, make=True, patience=60):
                inside.append(number)
                assert inside == [number]
                (folder / "file").touch()
                empty_but_for_lock(folder)
                inside.pop()
            with suppress(OSError):
                folder.parent.rmdir()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))
    assert not folder.parent.exists()


def test_a_window_that_is_forgotten_while_readers_speak(tmp_path):
    """A reader's word is written or lost with the window; none of both fails."""

    def forget(_rank: int) -> None:
        for _ in range(100):
            write_window(tmp_path, KeptWindow(keep=2, epochs=1))
            forget_window(tmp_path)

    def speak(rank: int) -> None:
        for turn in range(100):
            write_done(tmp_path, rank, 2, turn)
            time.sleep(0.001)
            assert read_window(tmp_path) in (None, KeptWindow(keep=2, epochs=1))
            assert read_done(tmp_path) <= turn + 100

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(lambda work, rank: work(rank), (forget, speak, speak), range(3)))


def test_vocabulary_maps_of_two_sizes_are_never_mixed(tmp_path):
    counts, gate = np.arange(300), threading.Barrier(4)

    def write(size: int) -> None:
        gate.wait()
        write_vocab_map(tmp_path, vocab_map(counts, size))

    for _ in range(5):
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(write, (50, 100, 150, 200)))
        size = len(np.load(tmp_path / "d2t.npy"))
        assert np.load(tmp_path / "t2d.npy").sum() == size
        assert len(torch.load(tmp_path / "vocab_mapping.pt")["d2t"]) == size
        assert len(torch.load(tmp_path / "selected_token_ids.pt")["selected_token_ids"]) == size
    assert len(list(tmp_path.iterdir())) == 4
