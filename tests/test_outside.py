"""Nothing outside OUT is touched, nothing foreign reaches the terminal raw, and what cannot begin says so."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import commands
import pytest
from jobs import on

from cache_format.errors import InputError
from cache_format.layout.manifest import Manifest
from cache_format.layout.shard_layout import finished_shards
from cache_format.storage.commit import sync_folder
from cache_format.writing.upload import scratch_folder
from extractor.job.out_folder import refuse_out_inside_data


@pytest.fixture
def outside(tmp_path) -> Path:
    """Somebody else's folder, with what looks like a half-written file."""
    folder = tmp_path / "outside"
    (folder / ".sub.tmp").mkdir(parents=True)
    (folder / ".x.tmp").write_bytes(b"not ours")
    return folder


@pytest.mark.parametrize("folder", ["samples", "shards", "target"])
def test_a_recode_follows_no_folder_out(made, cli, tmp_path, outside, folder):
    out = tmp_path / "recoded"
    out.mkdir()
    (out / folder).symlink_to(outside)
    code, _, err = cli("recode", made, out, "--codec", "zbits")
    assert (code, "leads out of the cache" in err, "Traceback" in err) == (1, True, False), err
    assert sorted(path.name for path in outside.iterdir()) == [".sub.tmp", ".x.tmp"]


def test_an_export_follows_no_folder_out(made, cli, tmp_path, outside):
    out = tmp_path / "exported"
    assert cli("export", made, out, "--to", "specforge", "--yes")[0] == 0
    folder = next(path for path in sorted(out.iterdir()) if path.is_dir())
    shutil.rmtree(folder)
    folder.symlink_to(outside)
    code, _, err = cli("export", made, out, "--to", "specforge", "--yes")
    assert (code, "leads out of the cache" in err, "Traceback" in err) == (1, True, False), err
    assert sorted(path.name for path in outside.iterdir()) == [".sub.tmp", ".x.tmp"]


def test_a_profile_goes_over_nothing_but_a_trace(cli, small_job, tmp_path, outside):
    data = Path(small_job[small_job.index("--data") + 1])
    (tmp_path / "link.json").symlink_to(outside / ".x.tmp")
    (tmp_path / "precious.json").write_text("{}")
    out = tmp_path / "cache"
    out.mkdir()
    wrong = [data, "/dev/null", tmp_path, tmp_path / "link.json", tmp_path / "precious.json", out / "trace.json"]
    for path in wrong:
        code, _, err = cli(*small_job, "--out", out, "--profile", path)
        assert (code, "--profile" in err, "Traceback" in err) == (2, True, False), err
        assert not list(out.iterdir())
    assert (tmp_path / "precious.json").read_text() == "{}"
    assert (outside / ".x.tmp").read_bytes() == b"not ours"
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "train.jsonl").write_bytes(data.read_bytes())
    code, _, err = cli(*on(small_job, rows), "--out", out, "--profile", rows / "trace.json")
    assert (code, "lies inside --data" in err) == (2, True), err
    for limit in ("5", "6"):
        out = tmp_path / limit
        assert cli(*small_job[:-1], limit, "--out", out, "--profile", tmp_path / "trace.json")[0] == 0
        assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_a_scratch_folder_is_looked_at_first(cli, small_job, tmp_path, outside, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    url = "s3://bucket/cache"
    name = scratch_folder(url, tmp_path).name
    (tmp_path / "file").write_text("mine")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / name).symlink_to(outside)
    (tmp_path / "holds" / name).mkdir(parents=True)
    (tmp_path / "holds" / name / "shards").symlink_to(outside)
    for scratch in ("file", "file/below", "linked", "holds"):
        code, _, err = cli(*small_job, "--out", url, "--scratch", tmp_path / scratch)
        assert (code, "--scratch" in err, "Traceback" in err) == (2, True, False), err
    assert sorted(path.name for path in outside.iterdir()) == [".sub.tmp", ".x.tmp"]
    assert (tmp_path / "file").read_text() == "mine"


NO_MEMORY = [
    MemoryError(),
    RuntimeError("can't start new thread"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"),
    ImportError("libarrow.so: failed to map segment from shared object"),
    SystemError("error return without exception set"),
]


@pytest.mark.parametrize("error", NO_MEMORY, ids=str)
def test_too_little_memory_is_told_without_a_traceback(made, cli, monkeypatch, error):
    def fails(_cache):
        raise error

    monkeypatch.setattr("extractor.job.inspect.summarise", fails)
    code, _, err = cli("inspect", made)
    assert (code, "not enough memory" in err, "Traceback" in err) == (1, True, False), err


def test_a_repair_leaves_what_is_no_cache(cli, tmp_path):
    """Exports and others have a manifest.json too."""
    for text in ('{"shard_size": 7}', "{", '{"format": "dflash-cache-export"}'):
        (tmp_path / "manifest.json").write_text(text)
        (tmp_path / "index.arrow").write_text("not ours")
        code, out, err = cli("repair", tmp_path, "--yes")
        assert (code, "nothing was touched" in err, "Traceback" in err) == (2, True, False), out + err
        assert sorted(path.name for path in tmp_path.iterdir()) == ["index.arrow", "manifest.json"]
        assert (tmp_path / "manifest.json").read_text() == text


def test_of_several_exports_at_once_one_works_and_the_others_say_who_does(made, tmp_path):
    out = tmp_path / "exported"
    exports = [commands.start("export", made, out, "--to", "specforge", "--yes") for _ in range(3)]
    ends = [(export.communicate()[1], export.returncode) for export in exports]
    assert any(code == 0 for _, code in ends)
    for err, code in ends:
        assert code == 0 or (code == 2 and "is writing this cache" in err), err
    assert not list(out.rglob(".*"))


def test_an_out_inside_the_data_is_refused_at_the_start(tmp_path):
    (tmp_path / "data").mkdir()
    for out in ("data/cache", "data", "data/a/b"):
        with pytest.raises(InputError, match="lies inside --data"):
            refuse_out_inside_data(tmp_path / out, ["hub/name", str(tmp_path / "data")])
    refuse_out_inside_data(tmp_path / "data-cache", [str(tmp_path / "data"), str(tmp_path / "rows.jsonl")])


@pytest.mark.filterwarnings("ignore:the file system of")
@pytest.mark.parametrize(("number", "stops"), [(errno.EINVAL, False), (errno.EOPNOTSUPP, False), (errno.EIO, True)])
def test_a_file_system_that_cannot_sync_folders_is_used(tmp_path, monkeypatch, number, stops):
    def refuse(_fd):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    if stops:
        with pytest.raises(OSError, match="error"):
            sync_folder(tmp_path)
    else:
        sync_folder(tmp_path)


HOSTILE = "\x1b]0;owned\x07\x1b[31mred\u202e"


def test_nothing_foreign_reaches_the_terminal_raw(made, cli, tmp_path):
    cache = shutil.copytree(made, tmp_path / "cache")
    manifest = Manifest.read(cache)
    replace(manifest, target=replace(manifest.target, name=HOSTILE)).write(cache)
    (cache / "shards" / f"{HOSTILE[:4]}.safetensors").write_bytes(b"x")
    os.rename(cache / "shards" / "shard-00001.safetensors", os.fsencode(cache / "shards") + b"/\xff\xfe")
    for command in (["inspect"], ["verify"], ["verify", "--quick"], ["repair", "--dry-run"]):
        _, out, err = cli(command[0], cache, *command[1:])
        for character in "\x1b\x07\u202e":
            assert character not in out + err
        assert "Traceback" not in err
    assert r"\x1b]0;owned\x07" in cli("inspect", cache)[1]


def test_names_that_cannot_be_are_told(made, cli, tmp_path):
    for name in ("x" * 300, "a/" * 3000):
        for command in (["verify", name], ["inspect", name], ["recode", made, name, "--codec", "zbits"]):
            code, _, err = cli(*command)
            assert (code, "Traceback" in err) == (2, False), (command, err)
    code, _, err = cli("verify", os.fsdecode(b"/tmp/\xff"))
    assert (code, "not UTF-8" in err) == (2, True)


def test_only_digits_are_digits():
    assert finished_shards(["shard-00003.safetensors", "shard-0000\u00b2.safetensors", "shard-\u0660" * 2]) == [3]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("seconds", [0.3, 1.0])
def test_a_signal_while_modules_are_imported(number, code, seconds):
    begin = "import sys; sys.argv = ['dflash-cache', 'verify', '/nowhere']; "
    begin += "import extractor.cli as c, importlib, time; old = importlib.import_module; print('up', flush=True); "
    begin += "sys.meta_path.insert(0, type('Slow', (), {'find_spec': lambda self, *a: time.sleep(0.05)})()); c.main()"
    process = subprocess.Popen([sys.executable, "-c", begin], stdout=-1, stderr=-1, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(seconds)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, "Traceback" in err) == (code, False), err


def test_an_unfinished_cache_is_one_line(made, cli, tmp_path):
    cache = shutil.copytree(made, tmp_path / "cache")
    manifest = Manifest.read(cache)
    files = {name: info for name, info in manifest.files.items() if name not in ("index.arrow", "shards.arrow")}
    for name in ("index.arrow", "shards.arrow"):
        (cache / name).unlink()
    shards = sorted((cache / "shards").iterdir())
    for shard in shards[2:]:
        shard.unlink()
    replace(manifest, state="extracting", files=files, measured=None).write(cache)
    code, out, _ = cli("verify", cache)
    assert code == 1
    assert f"unfinished: 2 of {len(shards)} shards; run its command again: cd " in out
    assert "repair" not in out
    code, out, _ = cli("verify", cache, "--json")
    report = json.loads(out)
    assert (len(report["problems"]), "proves" in report) == (1, False)
    data = bytearray(shards[0].read_bytes())
    data[-20] ^= 1
    shards[0].write_bytes(data)
    assert len(json.loads(cli("verify", cache, "--json")[1])["problems"]) == 2
