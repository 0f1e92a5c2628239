"""Raw states are cast on the way from the page cache: the same numbers, and no file that is cut ends the process."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import commands
import pytest
import torch
from synthetic import write_cache

from cache_format import CacheError, FeatureCache
from cache_format.storage import mapped_file
from cache_format.storage.mapped_file import MappedFile


def test_the_same_numbers_with_and_without_the_system_s_help(tmp_path, monkeypatch):
    write_cache(tmp_path / "c", [5, 300, 12, 1, 170], hidden=512, dtype="bfloat16", shard_bytes=256 << 10)
    stored = FeatureCache.open(tmp_path / "c").batch(range(5)).hidden_states
    asked: list[int] = []
    there = MappedFile.there
    monkeypatch.setattr(MappedFile, "there", lambda self, *place: asked.append(1) or there(self, *place))
    for dtype in (torch.float32, torch.float16, torch.float64):
        for helped in (True, False):
            if not helped:
                monkeypatch.setattr(mapped_file, "_madvise", None)
            batch = FeatureCache.open(tmp_path / "c").batch(range(5), dtype=dtype)
            assert torch.equal(batch.hidden_states, stored.to(dtype))
    assert asked
    # Where checksums are compared, or layers left out, it is read.
    asked.clear()
    checked = FeatureCache.open(tmp_path / "c", verify="sample").batch(range(5), dtype=torch.float32)
    assert torch.equal(checked.hidden_states, stored.float())
    fewer = FeatureCache.open(tmp_path / "c").batch(range(5), dtype=torch.float32, layers=[3])
    assert torch.equal(fewer.hidden_states, stored[..., 1024:].float())
    assert not asked


def read_what_was_cut(path: Path) -> None:
    """In a process of its own: it may be ended by SIGBUS."""
    cache = FeatureCache.open(path)
    cache.batch([0, 1], dtype=torch.float32)
    for shard in (path / "shards").iterdir():
        os.truncate(shard, 8192)
    with pytest.raises(CacheError, match="truncated since it was opened"):
        cache.batch([0, 1], dtype=torch.float32)
    os._exit(0)


def test_a_file_that_is_cut_while_it_is_read_is_an_error(tmp_path):
    write_cache(tmp_path / "c", [200, 200], hidden=64, dtype="bfloat16")
    process = commands.start("reader", before=functools.partial(read_what_was_cut, tmp_path / "c"))
    assert process.wait() == 0, process.stderr.read_text()[-2000:]
