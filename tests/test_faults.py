"""Disk full, permission denied, quota, a vanished mount: a clear error, finished shards intact, resume works."""

from __future__ import annotations

import ctypes
import errno
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from faulty_disk import NEEDS_NO_SPACE, REMOVES, Fault, FaultyDisk
from jobs import contents

import extractor.job.job
from cache_format.errors import StorageError
from cache_format.layout.manifest import MANIFEST_NAME, Manifest
from cache_format.writing.shard_buffer import ShardBuffer
from extractor.target.target_files import write_target_files

pytestmark = pytest.mark.usefixtures("loaded_once")

SAYS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EACCES: "permission denied",
    errno.EROFS: "the file system is read-only",
    errno.EIO: "the device reported an input/output error",
    errno.ENOENT: "the folder has vanished",
    errno.EFBIG: "larger than this file system or this process may write",
}
SPARED = {errno.ENOSPC: NEEDS_NO_SPACE, errno.EDQUOT: NEEDS_NO_SPACE}


@pytest.fixture(scope="module")
def whole(small_job, tmp_path_factory) -> dict[str, bytes]:
    """The files of that job's cache, made without a fault."""
    from extractor.cli.app import app

    out = tmp_path_factory.mktemp("whole") / "c"
    app([*small_job, "--out", str(out)], standalone_mode=False)
    files = contents(out)
    assert sum(name.startswith("shards/") for name in files) == 3
    return files


def assert_told(err: str, out: Path, number: int) -> None:
    """One message that names a path of the cache, what could not be done, why, and the way out."""
    line = re.search(rf"^error: {re.escape(str(out))}[^:]*: cannot [^:]+: (.+)$", err, re.M)
    assert line, err
    assert SAYS[number] in line[1], err
    assert "run the same command again" in line[1], err
    assert "Traceback" not in err
    assert "Exception ignored" not in err


def assert_nothing_half(out: Path, whole: dict[str, bytes]) -> None:
    """Every file under its final name is the one of the whole cache, or a manifest of an earlier state."""
    for name, data in contents(out).items() if out.exists() else ():
        if name not in (".lock", MANIFEST_NAME) and ".tmp" not in name:
            assert data == whole[name], name
    if (out / MANIFEST_NAME).exists():
        Manifest.read(out)


@pytest.fixture
def interrupted(cli, small_job, whole, tmp_path):
    """Run the job on a disk with this fault, check all that is promised, run it again without, compare every byte."""

    def run(fault: Fault) -> FaultyDisk:
        out = tmp_path / f"{fault.errno}-{fault.start}"
        with FaultyDisk(out, fault) as disk:
            code, _, err = cli(*small_job, "--out", out)
        failed = {kind for kind, _ in disk.failed}
        assert code == (1 if failed - set(REMOVES) else 0), (fault, err)
        if code:
            assert_told(err, out, fault.errno)
        assert_nothing_half(out, whole)
        finished = {path for kind, path in disk.done if kind == "rename" and path.startswith("shards/")}
        assert finished == {name for name in whole if (out / name).exists() and name.startswith("shards/")}
        code, _, err = cli(*small_job, "--out", out)
        assert code == 0, (fault, err)
        assert contents(out) == whole, fault
        return disk

    return run


@pytest.fixture
def operations(cli, small_job, whole, tmp_path) -> list[tuple[str, str]]:
    """Every write operation of a run without a fault."""
    with FaultyDisk(tmp_path / "clean") as disk:
        assert cli(*small_job, "--out", tmp_path / "clean")[0] == 0
    assert contents(tmp_path / "clean") == whole
    return disk.done


def test_a_disk_that_is_full_from_any_operation_on(operations, interrupted):
    for start in [start for start, (kind, _) in enumerate(operations) if kind not in NEEDS_NO_SPACE]:
        interrupted(Fault(start, errno.ENOSPC, NEEDS_NO_SPACE))


OTHERS = [errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO, errno.ENOENT]


@pytest.mark.parametrize("number", OTHERS, ids=errno.errorcode.get)
def test_other_refusals_take_turns_at_every_operation(operations, interrupted, number):
    for start in range(OTHERS.index(number), len(operations), len(OTHERS)):
        interrupted(Fault(start, number, SPARED.get(number, ())))


def test_a_write_that_stops_short_and_then_finds_the_disk_full(operations, interrupted):
    for start in [start for start, (kind, _) in enumerate(operations) if kind == "write"]:
        interrupted(Fault(start, errno.ENOSPC, NEEDS_NO_SPACE, short=True))


def test_writes_that_stop_short_are_gone_on_with(cli, small_job, whole, tmp_path):
    with FaultyDisk(tmp_path / "c", most_at_once=997):
        code, _, err = cli(*small_job, "--out", tmp_path / "c")
    assert code == 0, err
    assert contents(tmp_path / "c") == whole


# -- the operating system itself refuses ------------------------------------------------------------------------------


@pytest.fixture
def mount(tmp_path):
    """``mount("-t", "tmpfs", ...)`` a folder of its own; what it holds is gone after the test."""
    mounted = []

    def run(*arguments: object) -> Path:
        folder = tmp_path / f"mount{len(mounted)}"
        folder.mkdir()
        command = ["mount", *map(str, arguments), str(folder)]
        result = subprocess.run(command, capture_output=True, text=True) if shutil.which("mount") else None
        if result is None or result.returncode:
            pytest.skip(f"this user cannot mount: {result.stderr.strip() if result else 'there is no mount command'}")
        mounted.append(folder)
        return folder

    yield run
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], capture_output=True)


def finish(cli, small_job, out: Path, whole: dict[str, bytes]) -> None:
    """The same command again, now that nothing is in its way."""
    code, _, err = cli(*small_job, "--out", out)
    assert code == 0, err
    assert contents(out) == whole


def begin(cli, small_job, out: Path, whole: dict[str, bytes], missing: str = "shards/shard-00001.safetensors") -> None:
    """A cache with all but one of its shards."""
    finish(cli, small_job, out, whole)
    manifest = Manifest.read(out)
    for name in ("index.arrow", "shards.arrow", missing):
        (out / name).unlink()
    files = {name: info for name, info in manifest.files.items() if name not in ("index.arrow", "shards.arrow")}
    replace(manifest, state="extracting", files=files).write(out)


@pytest.mark.parametrize("looks_ahead", [True, False], ids=["looked_ahead", "filled_meanwhile"])
def test_file_systems_of_every_size(cli, small_job, whole, mount, monkeypatch, looks_ahead):
    """Told ahead (exit code 2) or met on the way (1), and finished as soon as there is space."""
    if not looks_ahead:
        monkeypatch.setattr(extractor.job.job, "require_space", lambda *arguments: None)
    total, codes = sum(map(len, whole.values())), []
    disk = mount("-t", "tmpfs", "-o", "size=16m", "tmpfs")
    for size in range(12 << 10, total, total // 24):
        out = disk / str(size)
        subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)
        code, _, err = cli(*small_job, "--out", out)
        codes.append(code)
        if code == 2:
            assert re.search(
                r"what is missing needs [\d.]+ KiB but the disk has [\d.]+ (KiB|B) free. Free some space", err
            ), err
            assert not any((out / "shards").iterdir())
        else:
            assert code == 1, err
            assert_told(err, out, errno.ENOSPC)
        assert_nothing_half(out, whole)
        subprocess.run(["mount", "-o", "remount,size=16m", disk], check=True)
        finish(cli, small_job, out, whole)
        shutil.rmtree(out)
    assert set(codes) == ({1, 2} if looks_ahead else {1})


def test_the_space_check_leaves_what_the_next_run_needs(cli, small_job, whole, tmp_path, monkeypatch):
    out = tmp_path / "c"
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("extractor.job.out_folder.shutil.disk_usage", lambda path: usage._replace(free=10_000))
    code, _, err = cli(*small_job, "--out", out)
    assert (code, "9.8 KiB free" in err) == (2, True)
    assert sorted(contents(out)) == [MANIFEST_NAME, "samples/samples-00000.arrow"]
    monkeypatch.undo()
    with FaultyDisk(out) as disk:
        finish(cli, small_job, out, whole)
    assert not any(path.startswith("samples/") for _, path in disk.done), "the samples were prepared again"


def test_a_file_system_that_became_read_only(cli, small_job, whole, mount):
    disk = mount("-t", "tmpfs", "-o", "size=16m", "tmpfs")
    out = disk / "c"
    begin(cli, small_job, out, whole)
    before = contents(out)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    code, _, err = cli(*small_job, "--out", out)
    assert code == 1
    assert_told(err, out, errno.EROFS)
    code, _, err = cli(*small_job, "--out", disk / "new")
    assert code == 1
    assert_told(err, disk / "new", errno.EROFS)
    assert contents(out) == before
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    finish(cli, small_job, out, whole)


def test_a_mount_that_vanishes_between_two_shards(cli, small_job, whole, mount, tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    disk = mount("--bind", tmp_path / "real")
    out, commit = disk / "c", ShardBuffer.commit

    def vanish_first(self, path: Path, **how: bool) -> int:
        if path.name == "shard-00001.safetensors":
            subprocess.run(["umount", "-l", disk], check=True)
        return commit(self, path, **how)

    monkeypatch.setattr(ShardBuffer, "commit", vanish_first)
    code, _, err = cli(*small_job, "--out", out)
    monkeypatch.undo()
    assert code == 1
    assert_told(err, out, errno.ENOENT)
    assert list(disk.iterdir()) == [], "something was written beside the mount"
    assert_nothing_half(tmp_path / "real" / "c", whole)
    subprocess.run(["mount", "--bind", tmp_path / "real", disk], check=True)
    finish(cli, small_job, out, whole)


@contextmanager
def permissions_obeyed() -> Iterator[None]:
    """Root obeys the permissions of files meanwhile: this thread and those it starts go without the two
    capabilities that stand above them, CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH (see capset(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    before = sets[0]
    sets[0] &= ~(1 << 1 | 1 << 2)
    assert libc.capset(header, sets) == 0
    try:
        yield
    finally:
        sets[0] = before
        assert libc.capset(header, sets) == 0


@pytest.mark.parametrize("folder", [".", "shards"])
def test_a_folder_without_write_permission(cli, small_job, whole, tmp_path, folder):
    out = tmp_path / "c"
    begin(cli, small_job, out, whole)
    before = contents(out)
    (out / folder).chmod(0o500)
    try:
        with permissions_obeyed():
            code, _, err = cli(*small_job, "--out", out)
    finally:
        (out / folder).chmod(0o700)
    assert code == 1
    assert_told(err, out, errno.EACCES)
    assert contents(out) == before
    finish(cli, small_job, out, whole)


def test_a_cache_that_may_not_be_looked_at(cli, small_job, whole, tmp_path):
    out = tmp_path / "c"
    begin(cli, small_job, out, whole)
    out.chmod(0)
    try:
        with permissions_obeyed():
            codes = [cli(*small_job, "--out", out), cli("verify", out), cli("inspect", out), cli("repair", out)]
    finally:
        out.chmod(0o700)
    for code, _, err in codes:
        assert code in (1, 2)
        assert "permission denied" in err.lower(), err
        assert str(out) in err
        assert "Traceback" not in err


def test_files_may_not_grow_beyond_a_limit(cli, small_job, whole, tmp_path):
    """EFBIG, after writes that stopped short: the limit cuts the largest file that is over it."""
    sizes = sorted({len(data) for data in whole.values()})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in [0, *(size - 1 for size in sizes)]:
        out = tmp_path / str(limit)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            code, _, err = cli(*small_job, "--out", out)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert code == 1, limit
        assert_told(err, out, errno.EFBIG)
        assert_nothing_half(out, whole)
        finish(cli, small_job, out, whole)


def test_target_files_that_a_library_could_not_write_are_told_with_their_folder(tmp_path):
    class FromRust:
        def save_pretrained(self, folder: str) -> None:
            raise Exception("No space left on device (os error 28)")

    class Bug:
        def save_pretrained(self, folder: str) -> None:
            raise RuntimeError("not of the disk")

    (tmp_path / "target").mkdir()
    with pytest.raises(StorageError, match=r"target: cannot .*the disk is full"):
        write_target_files(tmp_path, None, FromRust(), None)
    with pytest.raises(RuntimeError, match="not of the disk"):
        write_target_files(tmp_path, None, Bug(), None)


# -- verify and repair ------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(whole, tmp_path) -> Callable[[str], Path]:
    """A copy of the cache with a flipped byte in a shard, and ``index.arrow`` cut."""

    def make(name: str) -> Path:
        out = tmp_path / name
        for file, data in whole.items():
            (out / file).parent.mkdir(parents=True, exist_ok=True)
            (out / file).write_bytes(data)
        shard = out / "shards" / "shard-00001.safetensors"
        shard.write_bytes(shard.read_bytes()[:-1] + b"\7")
        (out / "index.arrow").write_bytes(whole["index.arrow"][:100])
        return out

    return make


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS], ids=errno.errorcode.get)
def test_a_repair_that_is_refused_at_any_operation_can_be_run_again(cli, small_job, whole, damaged, number):
    def repaired(out: Path, fault: Fault | None = None) -> tuple[int, str, FaultyDisk]:
        with FaultyDisk(out, fault) as disk:
            code, _, err = cli("repair", out, "--yes")
        return code, err, disk

    code, err, clean = repaired(damaged("clean"))
    assert (code, "now run this again" in err) == (1, True), err
    for start in range(len(clean.done)):
        out = damaged(str(start))
        _, err, disk = repaired(out, Fault(start, number, SPARED.get(number, ())))
        if {kind for kind, _ in disk.failed} - set(REMOVES):
            assert_told(err, out, number)
        aside = [data for name, data in contents(out).items() if name.startswith("quarantine/")]
        kept = [data for name, data in contents(out).items() if data == whole.get(name)]
        assert len(aside) + len(kept) >= len(whole) - 2, "something is gone"
        code, err, _ = repaired(out)
        assert code in (0, 1), err
        code, _, err = cli(*small_job, "--out", out)
        assert code == 0, (start, err)
        assert {name: data for name, data in contents(out).items() if not name.startswith("quarantine/")} == whole


@pytest.mark.parametrize(("arguments", "unbuffered"), [(["verify"], ""), (["repair", "--dry-run"], "1")])
def test_a_report_that_cannot_be_written_is_an_error(damaged, monkeypatch, arguments, unbuffered):
    """As in ``dflash-cache verify CACHE --json > report.json`` on a full disk."""
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    command, *options = arguments
    with open("/dev/full", "w") as full:
        run = [sys.executable, "-m", "extractor", command, damaged("c"), *options, "--json"]
        result = subprocess.run(run, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 1
    assert "error: standard output: cannot" in result.stderr
    assert "the disk is full" in result.stderr
    assert "Traceback" not in result.stderr
    assert "Exception ignored" not in result.stderr


def test_a_log_that_cannot_be_written_stops_no_extraction(cli, small_job, whole, tmp_path, monkeypatch):
    with open("/dev/full", "w", buffering=1) as full:
        monkeypatch.setattr(sys, "stderr", full)
        code, _, _ = cli(*small_job, "--out", tmp_path / "c")
        monkeypatch.undo()
        assert (code, contents(tmp_path / "c") == whole) == (0, True)
        with suppress(OSError):
            full.close()
