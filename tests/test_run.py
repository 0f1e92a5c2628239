"""How shards are made: memory that runs out, options that change kernels, what a profile shows."""

from __future__ import annotations

import json
import shutil
import sysconfig
from pathlib import Path

import commands
import pytest
import torch
from jobs import LAYER_IDS, contents

from cache_format import FeatureCache
from cache_format.layout.manifest import Manifest
from extractor.target.transformers_backend import TransformersBackend


class RunsOutOfMemory:
    """A forward pass that does not fit, ``times`` times, half of its rows written."""

    def __init__(self, monkeypatch, times: int):
        self.left, forward = times, TransformersBackend.forward

        def failing(extractor, input_ids, lengths, out, extra=None):
            if input_ids.numel() > 1000 and self.left:
                self.left -= 1
                out[: len(out) // 2] = 7
                raise torch.OutOfMemoryError("CUDA out of memory")
            forward(extractor, input_ids, lengths, out, extra)

        monkeypatch.setattr(TransformersBackend, "forward", failing)


CAN_COMPILE = (
    any(map(shutil.which, ("c++", "g++", "clang++"))) and Path(sysconfig.get_path("include"), "Python.h").exists()
)


def test_a_batch_that_did_not_fit_is_tried_again_and_gives_the_same_bytes(job, made, cli, tmp_path, monkeypatch):
    memory = RunsOutOfMemory(monkeypatch, 1)
    code, _, _ = cli("extract", *job, "--out", tmp_path / "cache")
    assert (code, memory.left) == (0, 0)
    assert contents(tmp_path / "cache") == contents(made)


def test_a_batch_that_does_not_fit_at_all_ends_the_run_and_keeps_what_is_done(job, made, cli, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        RunsOutOfMemory(patch, 99)
        code, _, errors = cli("extract", *job, "--out", tmp_path / "cache")
    assert code == 1
    assert "--batch-tokens" in errors
    assert "Finished shards are kept" in errors
    assert cli("extract", *job, "--out", tmp_path / "cache")[0] == 0
    assert contents(tmp_path / "cache") == contents(made)


def test_batch_tokens_auto_is_found_once_and_kept(job, cli, tmp_path):
    arguments = [*job, "--out", tmp_path / "cache", "--batch-tokens", "auto"]
    code, _, errors = cli("extract", *arguments)
    assert (code, "--batch-tokens auto: 8,192" in errors) == (0, True)
    assert Manifest.read(tmp_path / "cache").identity["batch_tokens"] == 8192
    before = contents(tmp_path / "cache")
    victim = sorted((tmp_path / "cache" / "shards").iterdir())[0]
    victim.unlink()
    cli("repair", tmp_path / "cache", "--yes")
    assert cli("extract", *arguments)[0] == 0
    after = contents(tmp_path / "cache")
    assert {name: after[name] for name in before} == before
    assert cli("extract", *job, "--out", tmp_path / "cache", "--batch-tokens", "4096")[0] == 2


def test_a_profile_shows_that_writing_goes_on_beside_the_target(job, cli, tmp_path):
    code, _, _ = cli("extract", *job, "--out", tmp_path / "cache", "--profile", tmp_path / "trace.json")
    assert code == 0
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    tracks = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    spans = [(tracks[e["tid"]], e["name"], e["ts"], e["ts"] + e["dur"]) for e in events if e["ph"] == "X"]
    assert {"forward", "collate", "check", "checksum and write", "wait for a buffer"} == {
        name for _, name, _, _ in spans
    }
    writes = [
        (a, b) for track, name, a, b in spans if name == "checksum and write" and track.startswith("shard-writer")
    ]
    forwards = [(a, b) for _, name, a, b in spans if name == "forward"]
    assert any(a < d and c < b for a, b in writes for c, d in forwards)


def test_a_profile_that_cannot_be_written_is_said_before_any_work(job, cli, tmp_path):
    code, _, errors = cli(
        "extract", *job, "--out", tmp_path / "cache", "--profile", tmp_path / "nowhere" / "trace.json"
    )
    assert (code, "--profile" in errors) == (2, True)
    assert not (tmp_path / "cache").exists()


def test_deterministic_gives_the_same_bits_twice(job, tmp_path):
    """In processes of their own: it is a setting of all of torch."""
    for name in ("one", "two"):
        commands.made("extract", *job, "--out", tmp_path / name, "--deterministic")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.slow
@pytest.mark.skipif(not CAN_COMPILE, reason="torch.compile needs a C++ compiler and Python's headers")
def test_compiled_layers_give_the_same_states_but_for_rounding(job, made, cli, tmp_path):
    layers = ["--target-layers", str(LAYER_IDS[1]), "--limit", "20"]
    code, _, errors = cli("extract", *job, *layers, "--out", tmp_path / "cache", "--compile")
    assert code == 0, errors
    compiled, plain = FeatureCache.open(tmp_path / "cache"), FeatureCache.open(made)
    width = compiled.hidden_size
    for i in range(len(compiled)):
        a, b = compiled[i].hidden_states, plain[i].hidden_states[..., width : 2 * width]
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()
    assert compiled.manifest.fingerprint != plain.manifest.fingerprint


@pytest.mark.slow
def test_a_machine_that_cannot_compile_is_told_so(job, tmp_path):
    (tmp_path / "bin").mkdir()
    nowhere = {"PATH": str(tmp_path / "bin"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "kernels"), "CXX": ""}
    code, _, errors = commands.run("extract", *job, "--out", tmp_path / "cache", "--compile", **nowhere)
    assert (code, "Traceback" in errors) == (2, False), errors
    assert "--compile: torch cannot compile this target here" in errors
