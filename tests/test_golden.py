"""Caches that an earlier version wrote are opened, verified and read to the same numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from make_golden_caches import read_alike

from cache_format import CacheError, FeatureCache
from cache_format.layout import manifest as manifest_module
from cache_format.layout.captures import Captures
from cache_format.layout.manifest import Manifest
from cache_format.upkeep.verify import verify

GOLDEN = Path(__file__).parent / "golden"
CACHES = sorted(path for path in GOLDEN.iterdir() if path.is_dir())


def test_every_codec_and_capture_has_one():
    assert {path.name.split("-")[0] for path in CACHES} >= {"raw", "fp8", "zbits", "quant"}
    captures = [manifest.capture for manifest in map(Manifest.read, CACHES)]
    assert {name for capture in captures for name, value in capture.items() if value} == set(Captures().to_dict())


@pytest.mark.parametrize("path", CACHES, ids=lambda path: path.name)
def test_an_earlier_cache_reads_to_the_same_numbers(path):
    assert verify(path).problems == []
    assert Manifest.read(path).to_bytes() == (path / "manifest.json").read_bytes()
    expected = json.loads((GOLDEN / f"{path.name}.json").read_text())["reads"]
    assert read_alike(FeatureCache.open(path, verify="sample")) == expected


def test_a_later_format_version_is_refused_by_name(tmp_path):
    content = json.loads((CACHES[0] / "manifest.json").read_text())
    content.pop("checksum")
    later = {**content, "format_version": 2, "unheard_of": True}
    later["checksum"] = manifest_module._checksum(later)
    (tmp_path / "manifest.json").write_text(json.dumps(later))
    with pytest.raises(CacheError, match="format version 2; this package reads version 1"):
        FeatureCache.open(tmp_path)
