"""estimate: hours and the disk's rate, at a rate that is stated or measured."""

from __future__ import annotations

import json

import pytest

from extractor.job import estimate_time


def test_at_a_stated_rate(cli, job):
    found = json.loads(cli("estimate", *job, "--tokens-per-second", "50", "--json")[1])
    time = found["time"]
    assert time["hours"] == time["gpu_hours"] == pytest.approx(found["tokens"] / 50 / 3600)
    assert time["disk_gb_per_second"] == pytest.approx(found["shard_bytes"] / found["tokens"] * 50 / 1e9)
    assert time["measured"] is False
    text = cli("estimate", *job, "--tokens-per-second", "50")[1]
    assert "50 tok/s a worker, as stated" in text
    assert "GPU-hours" in text
    assert "GB/s for each worker" in text
    without = cli("estimate", *job)[1]
    assert "tok/s" not in without
    assert "GPU-hours" not in without


def test_calibrate_times_batches_of_the_data_on_the_target(cli, job, monkeypatch):
    """On a clock by which each batch takes two seconds."""
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr(estimate_time.time, "perf_counter", lambda: float(next(clock)))
    passed = []
    forward = estimate_time.TargetBackend.row_memory

    def seen(self, tokens, device):
        passed.append(tokens)
        return forward(self, tokens, device)

    monkeypatch.setattr(estimate_time.TargetBackend, "row_memory", seen)
    code, out, errors = cli("estimate", *job, "--calibrate", "--json")
    assert code == 0, errors
    time = json.loads(out)["time"]
    warm_up, *timed = passed[-1 - estimate_time.BATCHES :]
    assert warm_up == timed[0]
    assert time["measured"] is True
    assert time["tokens_per_second"] == pytest.approx(sum(timed) / (2 * len(timed)))
    assert sum(timed) > 1000


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--calibrate", "--tokens-per-second", "5"), "give one of them"),
        (("--tokens-per-second", "0"), "must be more than 0"),
        (("--tokens-per-second", "inf"), "must be more than 0"),
        (("--tokens-per-second", "nan"), "must be more than 0"),
    ],
)
def test_refused(cli, job, options, why):
    code, _, errors = cli("estimate", *job, *options)
    assert code == 2
    assert why in errors
