"""Caches with every codec: synthetic ones, and extracted ones."""

from __future__ import annotations

import commands
import pytest
from codec_caches import LENGTHS
from synthetic import write_cache

from cache_format.codecs import CODECS


@pytest.fixture(scope="session", params=["float32", "bfloat16"])
def caches(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    for codec in CODECS:
        write_cache(folder / codec, LENGTHS, dtype=request.param, codec=codec, quarantined=(3,), shard_bytes=64 << 10)
    return {codec: folder / codec for codec in CODECS}


@pytest.fixture(scope="session")
def extracted(job, tmp_path_factory):
    """The job's caches with both codecs, each made by the command."""
    folder = tmp_path_factory.mktemp("extracted")
    for codec in ("fp8", "zbits", "quant"):
        commands.made("extract", *job, "--codec", codec, "--out", folder / codec)
    return folder
