"""A store that misbehaves at random, beside a job that writes to it and a trainer that reads from it, over and over."""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter

import pytest
import torch
from faulty_proxy import CUT_ANSWER, CUT_UPLOAD, ERROR, SILENCE, SLOW
from jobs import contents
from s3 import objects, upload_folder

from cache_format import FeatureCache

JOBS, EPOCHS = int(os.environ.get("SOAK_JOBS", 8)), int(os.environ.get("SOAK_EPOCHS", 20))
SHARE = 0.12
"""Of requests that meet a fault."""


class AtRandom:
    """Names a fault for a share of the requests."""

    def __init__(self, seed: int):
        self._random, self._lock = random.Random(seed), threading.Lock()

    def __call__(self, method: str, path: str) -> str | None:
        with self._lock:
            if self._random.random() > SHARE:
                return None
            cut = CUT_UPLOAD if method in ("PUT", "POST") else CUT_ANSWER
            return self._random.choices([ERROR, cut, SLOW, SILENCE], [8, 8, 3, 0.3])[0]


@pytest.mark.soak
def test_jobs_and_a_trainer_beside_faults(cli, job, bucket, s3, made, proxy, quick, tmp_path):
    """Every job ends in the same bytes, every epoch in the same numbers, perhaps after it was run again."""
    upload_folder(s3, f"{bucket}-read", made)
    local, seen, counts = FeatureCache.open(made), Counter(), Counter()
    right = [local[i].hidden_states for i in range(len(local))]
    proxy.faults = AtRandom(0)
    failures: list[str] = []

    def train() -> None:
        for epoch in range(EPOCHS):
            try:
                options = {"cache_dir": tmp_path / f"epoch-{epoch}"} if epoch % 2 else {"verify": "sample"}
                cache = FeatureCache.open(f"{bucket}-read", **options)
                for batch, samples in zip(cache.loader(batch_size=8), range(0, len(cache), 8), strict=True):
                    for row, i in enumerate(range(samples, min(samples + 8, len(cache)))):
                        if not torch.equal(batch.hidden_states[row : row + 1, : right[i].shape[1]], right[i]):
                            failures.append(f"epoch {epoch}, sample {i}")
                seen["epochs"] += 1
            except Exception as error:
                seen[type(error).__name__] += 1
                if type(error).__name__ != "StoreError":
                    failures.append(f"epoch {epoch}: {type(error).__name__}: {error}")

    trainer = threading.Thread(target=train)
    trainer.start()
    began = time.monotonic()
    for number in range(JOBS):
        out = f"{bucket}-{number}"
        arguments = ["extract", *job, "--out", out, "--scratch", tmp_path / "scratch"]
        for _ in range(10):
            code, _, errors = cli(*arguments)
            assert "Traceback" not in errors
            seen[f"exit code {code}"] += 1
            if code == 0:
                break
        assert code == 0, errors
        proxy.faults, faults = (lambda method, path: None), proxy.faults
        assert objects(s3, out) == contents(made)
        proxy.faults = faults
    trainer.join()
    counts.update(proxy.met)
    seconds = time.monotonic() - began
    print(f"{JOBS} jobs, {dict(seen)}, faults {dict(counts)} of {len(proxy.requests)} requests, {seconds:.0f} s")
    assert failures == []
    assert seen["epochs"] > EPOCHS / 2
