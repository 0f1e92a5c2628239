"""verify: whole caches pass, and every kind of damage is found, named and survived."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from synthetic import write_cache

from cache_format.errors import CacheError
from cache_format.layout.index import Index, read_index, read_shards, write_index, write_shards
from cache_format.layout.manifest import Manifest
from cache_format.upkeep.repair import plan_repair, repair
from cache_format.upkeep.verify import verify
from cache_format.writing.shard_buffer import ShardBuffer

LENGTHS = [5, 90, 17, 1, 40, 33, 64, 2, 71, 12, 300, 280, 310]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("cache") / "whole"
    write_cache(path, LENGTHS)
    return path


@pytest.fixture
def cache(whole, tmp_path) -> Path:
    return shutil.copytree(whole, tmp_path / "cache")


def shards_of(cache: Path) -> list[Path]:
    return sorted((cache / "shards").iterdir())


def test_a_whole_cache_passes(cache):
    for quick in (True, False):
        report = verify(cache, quick=quick)
        assert report.whole, report.problems
        assert report.samples == len(LENGTHS)
        assert report.bytes == sum(path.stat().st_size for path in shards_of(cache))


def test_a_cache_with_quarantined_samples_passes(tmp_path):
    write_cache(tmp_path / "c", LENGTHS, quarantined=(1, 10))
    report = verify(tmp_path / "c")
    assert report.whole, report.problems
    assert report.samples == len(LENGTHS) - 2


def test_every_flipped_bit_in_every_kind_of_file_is_found(cache):
    rng = random.Random(0)
    for path in sorted(p for p in cache.rglob("*") if p.is_file()):
        good = path.read_bytes()
        for _ in range(12):
            bad, at = bytearray(good), rng.randrange(len(good))
            bad[at] ^= 1 << rng.randrange(8)
            path.write_bytes(bad)
            report = verify(cache)
            assert not report.whole, f"{path.name}, byte {at} of {len(good)}"
            path.write_bytes(good)
    assert verify(cache).whole


def test_damage_in_states_is_named_by_shard_and_sample(cache):
    manifest = Manifest.read(cache)
    index = read_index(cache / "index.arrow", manifest.fingerprint)
    sample = 11
    path = shards_of(cache)[index.shard[sample]]
    data = bytearray(path.read_bytes())
    data[4096 + int(index.row_start[sample]) * manifest.width * 4 + 10] ^= 4
    path.write_bytes(data)
    (problem,) = verify(cache).problems
    assert (problem.shard, problem.sample) == (int(index.shard[sample]), sample)
    assert problem.file == f"shards/{path.name}"
    assert verify(cache, quick=True).whole


@pytest.mark.parametrize("quick", [True, False])
def test_missing_truncated_extra_and_swapped_shards_are_all_listed(cache, quick):
    shards = shards_of(cache)
    assert len(shards) >= 4
    shards[0].rename(cache / "aside")
    shards[1].rename(shards[0])
    (cache / "aside").rename(shards[1])
    shards[2].write_bytes(shards[2].read_bytes()[:-5])
    shards[3].unlink()
    (cache / "shards" / "shard-99999.safetensors").write_bytes(b"x")
    found = {problem.file.split("/")[1] for problem in verify(cache, quick=quick).problems}
    assert found == {*(path.name for path in shards[:4]), "shard-99999.safetensors"}


def test_a_missing_file_of_each_other_kind_is_found(cache):
    for name in ("index.arrow", "shards.arrow", "samples/samples-00001.arrow", "target/embeddings.safetensors"):
        moved = (cache / name).rename(cache / "aside")
        problems = verify(cache, quick=True).problems
        assert any(problem.file == name and "missing" in problem.problem for problem in problems)
        moved.rename(cache / name)


@pytest.mark.parametrize(
    "name", ["samples/samples-00001.arrow", "target/embeddings.safetensors", "index.arrow", "shards.arrow"]
)
def test_a_manifest_that_leaves_a_file_out_is_found_and_repaired(cache, name):
    """So that the file can be changed unnoticed."""
    manifest = Manifest.read(cache)
    files = {other: info for other, info in manifest.files.items() if other != name}
    replace(manifest, files=files).write(cache)
    found = [str(problem) for problem in verify(cache, quick=True).problems]
    assert found == [f"{name}: is not among the files that manifest.json has checksums of"]
    plan = plan_repair(cache, verify(cache).problems)
    repair(cache, plan)
    assert not (cache / name).exists() or verify(cache).whole
    assert plan.needs_extract == (not name.endswith(("index.arrow", "shards.arrow")))


def test_coverage_problems_name_the_sample(cache):
    manifest = Manifest.read(cache)
    index = read_index(cache / "index.arrow", manifest.fingerprint)
    columns = {name: np.array(getattr(index, name)) for name in Index.__slots__}
    columns["sample_id"][3] = 4
    write_index(cache / "index.arrow", Index(**columns), manifest.fingerprint)
    problems = {(p.sample, p.problem) for p in verify(cache, quick=True).problems if p.field == "sample_id"}
    assert (3, "is not in the index") in problems
    assert (4, "is in the index more than once") in problems


def test_a_table_that_lies_is_found(cache):
    manifest = Manifest.read(cache)
    rows = read_shards(cache / "shards.arrow", manifest.fingerprint)
    write_shards(cache / "shards.arrow", [rows[1], *rows[1:]], manifest.fingerprint)
    assert not verify(cache, quick=True).whole


def test_states_stored_under_the_tokens_of_another_sample_are_found(cache, tmp_path):
    """A writer's bug: all checksums fit, but two samples of one length changed places in the prepared samples."""
    from cache_format.layout.samples import PartInfo, PreparedSamples, part_path, write_part

    samples = PreparedSamples(cache / "samples", 2)
    loaded = [samples[i] for i in range(len(samples))]
    loaded[0], loaded[1] = loaded[1], loaded[0]
    half = len(loaded) // 2
    write_part(part_path(cache / "samples", 0), loaded[:half], PartInfo(0, half, {"bad_row": 0}))
    named = {p.sample for p in verify(cache).problems if p.field == "input_ids"}
    assert named == {0, 1}


def test_an_unfinished_cache_is_not_whole(tmp_path):
    write_cache(tmp_path / "c", LENGTHS, only_shards=[0])
    problems = verify(tmp_path / "c").problems
    assert any(problem.field == "state" for problem in problems)


def test_what_is_no_cache_cannot_be_verified(tmp_path):
    with pytest.raises(CacheError, match="not a feature cache"):
        verify(tmp_path)


@pytest.mark.parametrize(("field", "value"), [("attention_mask", 0), ("loss_mask", 2)])
def test_masks_that_the_format_does_not_allow_are_found(cache, field, value):
    """A writer's bug again: the checksums fit what it wrote."""
    manifest = Manifest.read(cache)
    number, path = 1, shards_of(cache)[1]
    stored = load_file(path)
    buffer = ShardBuffer(path.stat().st_size)
    buffer.begin(manifest.schema(), number, stored["sample_ids"].numpy(), stored["cu_seqlens"].diff().numpy())
    for name in ("hidden_states", "input_ids", "loss_mask"):
        buffer.tensor(name).copy_(stored[name])
    buffer.tensor(field)[3] = value
    buffer.commit(path)
    problems = verify(cache).problems
    assert (field, number, int(stored["sample_ids"][0])) in {(p.field, p.shard, p.sample) for p in problems}
    assert not any("checksum" in p.problem for p in problems if p.file.startswith("shards/"))
