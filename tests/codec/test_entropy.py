"""Entropy coding: the same bytes by a zstandard that codes in one call and by one that does not; hostile frames."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import zstandard

from cache_format.codecs import entropy
from cache_format.codecs.entropy import coder

PARTS = [np.random.default_rng(0).integers(0, most, 1000, np.uint8) for most in (2, 50, 256)]


def test_the_same_bytes_by_a_zstandard_of_the_system(monkeypatch):
    """Built so, it has no calls for many frames."""
    coded = coder().coded(PARTS)
    monkeypatch.setattr(entropy, "_IN_ONE_CALL", False)
    assert [part.tobytes() for part in coder().coded(PARTS)] == [part.tobytes() for part in coded]
    for found, part in zip(coder().decoded(coded, [1000] * 3), PARTS, strict=True):
        assert np.array_equal(found, part)


ZEROS = bytes(1000)
FRAME = zstandard.ZstdCompressor().compress(ZEROS)
RAW_BLOCK = struct.pack("<I", (5 << 3) | 1)[:3] + b"abcde"
MAGIC = b"\x28\xb5\x2f\xfd"
HOSTILE = {
    "nothing": (b"", 1000),
    "cut off": (FRAME[:-1], 1000),
    "of fewer": (FRAME, 1001),
    "of more": (FRAME, 10),
    "without a size": (zstandard.ZstdCompressor(write_content_size=False).compress(ZEROS), 1000),
    "empty": (zstandard.ZstdCompressor().compress(b""), 1000),
    "to be skipped": (struct.pack("<II", 0x184D2A50, 5) + b"abcde", 1000),
    "of a dictionary": (MAGIC + b"\x21\x07\x05" + RAW_BLOCK, 5),
    "claims a window of 2 TiB": (MAGIC + b"\x00\xf8" + RAW_BLOCK, 5),
    "claims 1 TiB": (MAGIC + b"\xe0" + struct.pack("<Q", 1 << 40) + RAW_BLOCK, 5),
}


@pytest.mark.parametrize("in_one_call", [True, False])
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_frame_is_refused(kind, in_one_call, monkeypatch):
    monkeypatch.setattr(entropy, "_IN_ONE_CALL", in_one_call)
    frame, count = HOSTILE[kind]
    with pytest.raises(ValueError, match="damaged"):
        coder().decoded([np.frombuffer(frame, np.uint8), np.frombuffer(FRAME, np.uint8)], [count, 1000])
