"""Two commands that choose one OUT at the same moment: the later one finds what the other made, and leaves it."""

from __future__ import annotations

import os
from contextlib import contextmanager

import commands
import pytest
from jobs import contents

from cache_format.errors import InputError
from cache_format.storage import own_folders
from cache_format.storage.own_folders import refuse_foreign


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
