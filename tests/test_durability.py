"""Power cuts: what is on the disk after one is what was fsynced, and from that the job goes on to the same bytes.

``PowerCuts`` follows the calls that make things durable and keeps what would survive at each of them: a file's bytes
as of its last fsync, a folder's names as of its last fsync. A rename may also reach the disk early, on its own.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jobs import contents

from cache_format.layout.manifest import MANIFEST_NAME, Manifest
from cache_format.layout.shard_layout import shard_name
from cache_format.storage.commit import committed, make_folder, write_all
from cache_format.storage.file_info import file_info
from cache_format.upkeep.repair import QUARANTINE_NAME
from cache_format.upkeep.verify import verify

pytestmark = pytest.mark.usefixtures("loaded_once")

Tree = dict[str, bytes | None]
"""Path below the root -> bytes; None for a folder."""


class PowerCuts:
    """While active: ``calls`` on what lies below ``root``, in order, and ``survivors`` of a cut at each of them."""

    def __init__(self, root: Path):
        self.root = root
        self.calls: list[tuple[str, str]] = []
        self.survivors: list[Tree] = []
        self._bytes: dict[int, bytes] = {}
        self._names: dict[int, dict[str, tuple[int, bool]]] = {}
        for folder, _, files in os.walk(root):
            self._sync(Path(folder))
            for name in files:
                self._sync(Path(folder, name))

    def __enter__(self) -> PowerCuts:
        self._patch = pytest.MonkeyPatch()
        fsync, replace = os.fsync, os.replace

        def traced_fsync(fd: int) -> None:
            fsync(fd)
            path = Path(os.readlink(f"/proc/self/fd/{fd}"))
            if path == self.root or path.is_relative_to(self.root):
                self._sync(path)
                self._note("fsync", path)

        def traced_rename(source: Any, target: Any) -> None:
            source, target = Path(source), Path(target)
            if target.is_relative_to(self.root):
                self._note("rename", target)
                inode = source.stat().st_ino
                assert self._bytes.get(inode) == source.read_bytes(), (
                    f"{target} gets its name before its bytes are safe"
                )
                self._early(target, inode)
            replace(source, target)

        self._patch.setattr(os, "fsync", traced_fsync)
        self._patch.setattr(os, "replace", traced_rename)
        self._patch.setattr(os, "rename", traced_rename)
        return self

    def __exit__(self, *exc: object) -> None:
        self._patch.undo()

    def _note(self, call: str, path: Path) -> None:
        self.calls.append((call, path.relative_to(self.root).as_posix()))
        self._keep(self._surviving(self.root.stat().st_ino))

    def _keep(self, tree: Tree) -> None:
        if tree not in self.survivors:
            self.survivors.append(tree)

    def _sync(self, path: Path) -> None:
        if path.is_dir():
            self._names[path.stat().st_ino] = {e.name: (e.inode(), e.is_dir()) for e in os.scandir(path)}
        else:
            self._bytes[path.stat().st_ino] = path.read_bytes()

    def _early(self, target: Path, inode: int) -> None:
        """The rename reached the disk at once, and nothing else that was not synced."""
        names = self._names.get(target.parent.stat().st_ino, {})
        before = dict(names)
        names[target.name] = inode, False
        self._keep(self._surviving(self.root.stat().st_ino))
        names.clear()
        names.update(before)

    def _surviving(self, folder: int) -> Tree:
        tree: Tree = {}
        for name, (inode, is_folder) in self._names.get(folder, {}).items():
            if is_folder:
                tree[name] = None
                tree |= {f"{name}/{below}": data for below, data in self._surviving(inode).items()}
            else:
                # Its name survives, its bytes were never synced: an empty file, as file systems leave it.
                tree[name] = self._bytes.get(inode, b"")
        return tree


def lay_out(tree: Tree, folder: Path) -> Path:
    """``folder`` as it is after the power cut."""
    folder.mkdir()
    for name, data in sorted(tree.items()):
        if data is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(data)
    return folder


def assert_what_the_manifest_names_is_there(cache: Path) -> None:
    """A manifest that survived is whole, and so is all that it names."""
    if not (cache / MANIFEST_NAME).exists():
        return
    manifest = Manifest.read(cache)
    for name, info in manifest.files.items():
        assert file_info(cache / name) == info, name
    if manifest.state == "complete":
        assert verify(cache).whole, verify(cache).problems


@pytest.fixture(autouse=True)
def two_parts(monkeypatch) -> None:
    """Of samples/, so that more than one is committed."""
    monkeypatch.setattr("extractor.data.prepare.ROWS_PER_PART", 5)


@pytest.fixture
def traced(cli, small_job, tmp_path) -> Callable[[], tuple[PowerCuts, dict[str, bytes]]]:
    """Run the job from nothing; what was traced, and the whole cache's files."""

    def run() -> tuple[PowerCuts, dict[str, bytes]]:
        (tmp_path / "disk").mkdir()
        with PowerCuts(tmp_path / "disk") as cuts:
            code, _, err = cli(*small_job, "--out", tmp_path / "disk" / "c")
        assert code == 0, err
        return cuts, contents(tmp_path / "disk" / "c")

    return run


def test_a_commit_syncs_the_file_then_renames_then_syncs_the_folder(tmp_path):
    with PowerCuts(tmp_path) as cuts, committed(tmp_path / "f") as file:
        write_all(file, b"whole")
        name = Path(file.name).name
    assert cuts.calls == [("fsync", name), ("rename", "f"), ("fsync", ".")]
    # The folder is synced once, after the rename: before it nothing is there, or the early rename, which is whole.
    assert cuts.survivors == [{}, {"f": b"whole"}]


def test_a_new_folder_is_durable_before_anything_is_put_in_it(tmp_path):
    with PowerCuts(tmp_path) as cuts:
        make_folder(tmp_path / "a" / "b")
    assert cuts.calls == [("fsync", "."), ("fsync", "a")]
    assert cuts.survivors[-1] == {"a": None, "a/b": None}


def test_a_name_before_its_bytes_would_be_noticed(tmp_path, monkeypatch):
    """The model itself: a commit that forgets its fsync does not pass."""
    with PowerCuts(tmp_path) as cuts, pytest.raises(AssertionError, match="before its bytes are safe"):
        (tmp_path / "half").write_bytes(b"x")
        os.replace(tmp_path / "half", tmp_path / "f")
    assert ("rename", "f") in cuts.calls


def test_commits_come_in_the_order_of_the_format(traced):
    cuts, whole = traced()
    committed_ = [path.removeprefix("c/") for call, path in cuts.calls if call == "rename"]
    assert sorted(set(committed_)) == sorted(whole), "every file is committed, none written in place"
    shards = [name for name in committed_ if name.startswith("shards/")]
    assert sorted(shards) == [shard_name(number) for number in range(3)]
    steps = [name if name == MANIFEST_NAME or name.endswith("s.arrow") or name == "index.arrow" else name.split("/")[0]
             for name in committed_]  # fmt: skip
    expected = [MANIFEST_NAME, "samples", "target", MANIFEST_NAME, "shards", "index.arrow", "shards.arrow"]
    assert [step for step, before in zip(steps, [None, *steps], strict=False) if step != before] == [
        *expected,
        MANIFEST_NAME,
    ]
    for number, (call, path) in enumerate(cuts.calls):
        if call == "rename":
            assert ("fsync", str(Path(path).parent)) in cuts.calls[number:], f"the folder of {path} is not synced"


def test_after_a_power_cut_at_any_call_the_job_goes_on_to_the_same_bytes(traced, cli, small_job, tmp_path):
    cuts, whole = traced()
    assert len(cuts.survivors) >= 15
    states = set()
    for number, tree in enumerate(cuts.survivors):
        disk = lay_out(tree, tmp_path / f"cut-{number}")
        out = disk / "c"
        assert_what_the_manifest_names_is_there(out)
        states.add(Manifest.read(out).state if (out / MANIFEST_NAME).exists() else "nothing")
        code, _, err = cli(*small_job, "--out", out)
        assert code == 0, (number, err)
        assert contents(out) == whole, number
        shutil.rmtree(disk)
    assert states == {"nothing", "preparing", "extracting", "complete"}


def test_after_a_power_cut_in_a_repair_nothing_is_gone_and_it_can_be_run_again(traced, cli, small_job, tmp_path):
    _, whole = traced()
    damaged = tmp_path / "damaged" / "c"
    shutil.copytree(tmp_path / "disk" / "c", damaged)
    shard = damaged / shard_name(1)
    shard.write_bytes(shard.read_bytes()[:-1] + b"\7")
    (damaged / "index.arrow").write_bytes(whole["index.arrow"][:100])
    bad = contents(damaged)
    with PowerCuts(tmp_path / "damaged") as cuts:
        assert cli("repair", damaged, "--yes")[0] == 1
    assert len(cuts.survivors) > 4
    for number, tree in enumerate(cuts.survivors):
        out = lay_out(tree, tmp_path / f"cut-{number}") / "c"
        kept = set(contents(out).values())
        assert {data for name, data in bad.items() if name != MANIFEST_NAME} <= kept, "something is gone"
        if (out / MANIFEST_NAME).exists():
            Manifest.read(out)
        assert cli("repair", out, "--yes")[0] == 1
        code, _, err = cli(*small_job, "--out", out)
        assert code == 0, (number, err)
        after = contents(out)
        assert {name: data for name, data in after.items() if not name.startswith(QUARANTINE_NAME)} == whole
