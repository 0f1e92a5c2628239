"""The same over and over, at other random places each time: scripts/test.sh --all."""

from __future__ import annotations

import random

import fuzz
import pytest
import soak_kill

pytestmark = pytest.mark.soak


def test_two_hundred_kills_change_no_byte(job, tmp_path):
    report = soak_kill.soak(job, tmp_path, kills=200, seed=random.randrange(1 << 30))
    assert (report.differing_bytes, report.failures) == (0, [])


def test_ten_thousand_mutated_files(tmp_path):
    fuzz.make(tmp_path / "cache")
    first = random.randrange(1 << 30)
    results = fuzz.run(tmp_path / "cache", range(first, first + 10_000), tmp_path)
    assert [result for result in results if result[2].startswith("FINDING")] == []
