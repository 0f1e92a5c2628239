"""What a resume takes for finished: a shard whose head is, byte for byte, what the plan lays down."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cache_format.errors import CacheError
from cache_format.layout.manifest import Manifest
from cache_format.layout.samples import PreparedSamples
from cache_format.layout.shard_layout import shard_name
from cache_format.layout.shard_reader import ShardFile
from extractor.config import PlanOptions
from extractor.job.missing_shards import missing_shards
from extractor.job.plan import Plan


@pytest.fixture
def scan(made, tmp_path):
    """A copy of the cache, and ``scan() -> list`` of its missing shards."""
    cache = Path(shutil.copytree(made, tmp_path / "cache"))
    manifest = Manifest.read(cache)
    samples = PreparedSamples(cache / "samples", manifest.totals.parts)
    options = PlanOptions(shard_bytes=2 << 20, batch_tokens=2048)
    plan = Plan(samples.num_tokens, manifest.schema().raw.token_bytes, options)
    return cache, lambda: missing_shards(cache, manifest.schema(), plan, range(len(plan)))


def test_finished_shards_are_told_without_parsing_them(scan, monkeypatch):
    cache, missing = scan
    monkeypatch.setattr("extractor.job.missing_shards.ShardFile", None)
    assert missing() == []
    (cache / shard_name(2)).unlink()
    assert missing() == [2]


def test_any_change_of_header_lengths_or_ids_is_noticed(scan):
    cache, missing = scan
    path = cache / shard_name(1)
    whole = path.read_bytes()
    with ShardFile(path, Manifest.read(cache).schema(), 1) as shard:
        stop = shard.container.places["sample_ids"].stop
    for at in range(0, stop, 5):
        changed = bytearray(whole)
        changed[at] ^= 4
        path.write_bytes(changed)
        with pytest.raises(CacheError):
            missing()


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"x", lambda data: b""])
def test_another_size_is_noticed(scan, change):
    cache, missing = scan
    path = cache / shard_name(1)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(CacheError, match=r"shard-00001.*dflash-cache repair"):
        missing()


def test_a_shard_of_another_number_is_noticed(scan):
    cache, missing = scan
    shutil.copyfile(cache / shard_name(0), cache / shard_name(1))
    with pytest.raises(CacheError, match="shard-00001"):
        missing()
