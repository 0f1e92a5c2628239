"""recode: the copy is what extract would have made, whatever happens on the way."""

from __future__ import annotations

import json
import shutil

import pytest
import soak_kill
import torch
from codec_caches import close
from jobs import contents

from cache_format import CacheError, FeatureCache, InputError, MismatchError
from cache_format.upkeep.recode import recode
from cache_format.upkeep.verify import verify


def shards_of(cache):
    return {path.name: path.read_bytes() for path in (cache / "shards").iterdir()}


@pytest.mark.parametrize("threads", [1, 3])
def test_recoded_is_what_would_have_been_extracted(caches, tmp_path, threads):
    raw = FeatureCache.open(caches["raw"], verify="sample")
    for codec in ("zbits", "fp8", "quant"):
        report = recode(raw, tmp_path / codec, codec, threads=threads)
        assert shards_of(tmp_path / codec) == shards_of(caches[codec])
        assert FeatureCache.open(tmp_path / codec).manifest.fingerprint == (
            FeatureCache.open(caches[codec]).manifest.fingerprint
        )
        assert verify(tmp_path / codec).whole
        assert (report.done_shards, report.shards) == (0, raw.manifest.totals.shards)
        assert report.bytes < report.bytes_before
    back = recode(FeatureCache.open(tmp_path / "zbits", verify="sample"), tmp_path / "back", "raw", threads=threads)
    assert shards_of(tmp_path / "back") == shards_of(caches["raw"])
    assert back.ratio == 1.0


def test_recode_resumes_and_refuses_what_is_not_its_own(caches, tmp_path):
    raw, out = FeatureCache.open(caches["raw"], verify="sample"), tmp_path / "out"
    made = 0

    def stop(_num_bytes):
        nonlocal made
        made += 1
        if made == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recode(raw, out, "zbits", threads=1, progress=stop)
    with pytest.raises(CacheError, match="not complete"):
        FeatureCache.open(out)
    with pytest.raises(MismatchError, match="codec"):
        recode(raw, out, "fp8", threads=1)
    report = recode(raw, out, "zbits", threads=1)
    assert report.done_shards >= 3
    assert shards_of(out) == shards_of(caches["zbits"])
    with pytest.raises(InputError, match="already"):
        recode(raw, tmp_path / "x", "raw", threads=1)
    with pytest.raises(InputError, match="rounded"):
        recode(FeatureCache.open(caches["fp8"]), tmp_path / "x", "zbits", threads=1)
    with pytest.raises(InputError, match="known: raw, fp8, zbits, quant"):
        recode(raw, tmp_path / "x", "zip", threads=1)
    with pytest.raises(InputError, match="beside"):
        recode(raw, caches["raw"] / "in", "zbits", threads=1)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        recode(raw, tmp_path / "other", "zbits", threads=1)


def test_recode_does_not_carry_damage_on(caches, tmp_path):
    cache = tmp_path / "c"
    shutil.copytree(caches["raw"], cache)
    opened = FeatureCache.open(cache, verify="sample")
    shard, start, _ = opened._source.locate(8)
    offset, _ = shard.file.row_range("hidden_states", start, start + 1)
    with open(shard.file.where, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(CacheError, match="does not match its checksum"):
        recode(opened, tmp_path / "out", "zbits", threads=2)


def test_recode_makes_the_bytes_that_extract_makes(made, extracted, tmp_path, cli):
    code, out, _ = cli("recode", made, tmp_path / "zbits", "--codec", "zbits", "--json")
    assert code == 0
    assert json.loads(out)["ratio"] < 0.87
    assert contents(tmp_path / "zbits") == contents(extracted / "zbits")
    code, _, err = cli("recode", made, tmp_path / "fp8", "--codec", "fp8")
    assert (code, "SNR by layer, median and worst token" in err) == (0, True)
    ours, theirs = FeatureCache.open(tmp_path / "fp8"), FeatureCache.open(extracted / "fp8")
    assert ours.manifest.fingerprint == theirs.manifest.fingerprint
    for i in range(len(ours)):
        assert torch.equal(ours[i].hidden_states, theirs[i].hidden_states)
    assert cli("recode", made, tmp_path / "zbits", "--codec", "zbits")[0] == 0, "again: nothing to do"
    assert cli("recode", tmp_path, tmp_path / "x", "--codec", "zbits")[0] == 2
    assert cli("recode", made, tmp_path / "quant", "--codec", "quant")[0] == 0
    assert contents(tmp_path / "quant") == contents(extracted / "quant"), "its statistics too"
    for wrong in ("zip", "quant:coarse", "quant:5dB", "quant:fine:x", "raw:fine"):
        assert cli("recode", made, tmp_path / "x", "--codec", wrong)[0] == 2


@pytest.mark.parametrize("codec", ["zbits", "quant"])
def test_recode_killed_at_random_operations_ends_in_the_same_bytes(made, extracted, tmp_path, codec):
    arguments = ["recode", str(made), str(tmp_path / "c"), "--codec", codec]
    for step in (3, 9, 17, 4, 12):
        if soak_kill.run(arguments, tmp_path / "log", die_at=step) == 0:
            break
    assert soak_kill.run(arguments, tmp_path / "log") == 0
    assert contents(tmp_path / "c") == contents(extracted / codec)


def test_fp8_becomes_quant_and_says_that_it_was_rounded_twice(made, extracted, job, tiny_target, tmp_path, cli):
    out = tmp_path / "twice"
    assert cli("recode", extracted / "fp8", out, "--codec", "quant")[0] == 0
    raw, twice = FeatureCache.open(made), FeatureCache.open(out, verify="sample")
    assert twice.manifest.identity["codec.before"] == "fp8"
    assert twice.manifest.fingerprint != FeatureCache.open(extracted / "quant").manifest.fingerprint
    assert all(close("quant", raw[i].hidden_states, twice[i].hidden_states) for i in range(len(raw)))
    code, _, err = cli("verify", out, "--recompute", 5, "--target", tiny_target)
    assert code == 0, err
    code, _, err = cli("extract", *job, "--codec", "quant", "--out", out)
    assert (code, "codec.before" in err) == (2, True), "it would put shards of other bytes beside these"
    assert cli("recode", extracted / "quant", tmp_path / "x", "--codec", "fp8")[0] == 2
