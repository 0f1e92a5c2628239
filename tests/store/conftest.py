"""A job and its cache for the tests of stores."""

from __future__ import annotations

from pathlib import Path

import commands
import pytest

from cache_format.storage import store


@pytest.fixture(scope="module")
def job(job) -> list[str]:
    """A third of the samples in shards of a quarter: every test here runs it."""
    return [*job, "--limit", "40", "--shard-size", "512KiB"]


@pytest.fixture(scope="module")
def made(job, tmp_path_factory) -> Path:
    """The same cache on a disk."""
    out = tmp_path_factory.mktemp("made") / "cache"
    commands.made("extract", *job, "--out", out)
    return out


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(store, "PAUSE_SECONDS", 0.01)


@pytest.fixture
def arguments(job, bucket, tmp_path, quick) -> list:
    return ["extract", *job, "--out", bucket, "--scratch", tmp_path / "scratch"]
