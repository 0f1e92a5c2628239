"""repair and verify --recompute: whatever is damaged is set aside and made again, to the same bytes."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from jobs import contents
from safetensors.torch import load_file, save_file

from cache_format import FeatureCache
from cache_format.layout.manifest import Manifest
from cache_format.upkeep.verify import verify


def flip(path: Path, at: int = -20) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def shards(cache: Path) -> list[Path]:
    return sorted((cache / "shards").iterdir())


DAMAGE = {
    "a bit in the states of two shards": lambda c: [flip(shards(c)[n], 70_000) for n in (1, 3)],
    "a bit in a shard's ids": lambda c: flip(shards(c)[0], 4096 - 30),
    "a missing shard": lambda c: shards(c)[2].unlink(),
    "a truncated shard": lambda c: cut(shards(c)[2]),
    "two swapped shards": lambda c: swap(*shards(c)[:2]),
    "an extra shard": lambda c: (c / "shards" / "shard-00777.safetensors").write_bytes(b"x"),
    "a damaged index": lambda c: flip(c / "index.arrow", 1500),
    "a missing index": lambda c: (c / "index.arrow").unlink(),
    "damaged shards.arrow": lambda c: cut(c / "shards.arrow"),
    "damaged samples": lambda c: flip(c / "samples" / "samples-00000.arrow", 5000),
    "missing embeddings": lambda c: (c / "target" / "embeddings.safetensors").unlink(),
    "a damaged manifest": lambda c: flip(c / "manifest.json", 40),
    "a space more in the manifest": lambda c: (c / "manifest.json").write_text((c / "manifest.json").read_text() + " "),
}


def swap(a: Path, b: Path) -> None:
    one, two = a.read_bytes(), b.read_bytes()
    a.write_bytes(two)
    b.write_bytes(one)


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_repair_then_extract_gives_the_same_bytes(made, job, cli, tmp_path, damage):
    cache = shutil.copytree(made, tmp_path / "cache")
    damage(cache)
    before = contents(cache)
    assert cli("repair", cache, "--dry-run")[0] == 1
    assert contents(cache) == before, "--dry-run changes nothing"
    code, out, err = cli("repair", cache)
    repaired = Path(cache / "manifest.json").exists() and Manifest.read(cache).state == "complete"
    assert code == (0 if repaired else 1), (out, err)
    kept = {p.name: p.stat().st_mtime_ns for p in shards(cache)}
    code, _, err = cli("extract", *job, "--out", cache)
    assert code == 0, err
    after = contents(cache)
    set_aside = {name for name in after if name.startswith("quarantine/")}
    assert {name: data for name, data in after.items() if name not in set_aside} == contents(made)
    assert {p.name: p.stat().st_mtime_ns for p in shards(cache) if p.name in kept} == kept, "good shards are not redone"
    assert cli("verify", cache)[0] == 0


def test_nothing_is_deleted_by_a_repair(made, cli, tmp_path):
    cache = shutil.copytree(made, tmp_path / "cache")
    for _ in range(2):
        flip(shards(cache)[1], 70_000)
        before = set(contents(cache).values())
        cli("repair", cache)
        assert before - set(contents(cache).values()) <= {contents(made)["manifest.json"]}
        shutil.copy(made / "shards" / "shard-00001.safetensors", cache / "shards")
    assert len(list((cache / "quarantine").iterdir())) >= 2


def test_a_whole_cache_is_left_alone(made, cli):
    before = contents(made)
    code, out, _ = cli("repair", made)
    assert (code, "nothing to repair" in out) == (0, True)
    assert contents(made) == before
    assert cli("repair", made.parent)[0] == 2


def test_recompute_proves_that_states_belong_to_tokens_and_target(made, cli, tiny_target, tmp_path):
    code, out, err = cli("verify", made, "--recompute", "10", "--target", tiny_target)
    assert (code, "recomputed 10 samples" in out) == (0, True), err
    code, out, _ = cli("verify", made, "--recompute", "4", "--target", tiny_target, "--json")
    assert json.loads(out)["recompute"]["largest_error"] < 1e-4
    assert cli("verify", made, "--recompute", "4")[0] == 2

    other = shutil.copytree(tiny_target, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] *= 1.5
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    code, _, err = cli("verify", made, "--recompute", "4", "--target", other)
    assert (code, "target.weights" in err) == (2, True)


def test_recompute_finds_states_filed_under_other_tokens(made, cli, tiny_target, tmp_path):
    """The bug that no checksum can find: right when written, but of another sample."""
    from cache_format.layout.shard_layout import shard_name
    from cache_format.layout.shard_reader import ShardFile
    from cache_format.writing.seal import seal
    from cache_format.writing.shard_buffer import ShardBuffer

    cache = shutil.copytree(made, tmp_path / "cache")
    manifest = Manifest.read(cache)
    with ShardFile(cache / shard_name(1), manifest.schema(), 1) as shard:
        ids, lengths = shard.sample_ids, shard.cu_seqlens[1:] - shard.cu_seqlens[:-1]
    stored = load_file(cache / shard_name(1))
    buffer = ShardBuffer(10 << 20)
    buffer.begin(manifest.schema(), 1, ids, lengths)
    for name in ("input_ids", "loss_mask"):
        buffer.tensor(name).copy_(stored[name])
    buffer.tensor("hidden_states").copy_(torch.roll(stored["hidden_states"], 1, dims=0))
    buffer.commit(cache / shard_name(1))
    files = {name: info for name, info in manifest.files.items() if name not in ("index.arrow", "shards.arrow")}
    from dataclasses import replace

    seal(cache, replace(manifest, files=files))
    assert verify(cache).whole
    code, out, _ = cli("verify", cache, "--recompute", "120", "--target", tiny_target)
    assert code == 1
    assert "shards/shard-00001.safetensors" in out
    assert "is not what the target gives" in out


def test_a_reader_stays_open_while_a_repair_runs(made, cli, tmp_path):
    cache = shutil.copytree(made, tmp_path / "cache")
    reader = FeatureCache.open(cache)
    good, bad, other = (int((reader.index.shard == number).nonzero()[0][0]) for number in (0, 1, 2))
    before = {i: reader[i].hidden_states.clone() for i in (good, bad)}
    shard = cache / "shards" / "shard-00001.safetensors"
    flip(shard, 70_000)
    held = reader[bad].hidden_states
    cli("repair", cache)
    assert not shard.exists()
    assert torch.equal(reader[good].hidden_states, before[good])
    assert held.shape == before[bad].shape, "what was mapped stays mapped"
    assert reader[other].input_ids.numel() > 0
    assert set(FeatureCache.open(cache, allow_incomplete=True).index.shard) == set(reader.index.shard) - {1}


def replaced_by_a_link(path: Path, outside: Path) -> None:
    """The file or folder moves out of the cache, and a link to it takes its place."""
    path.rename(outside / path.name)
    path.symlink_to(outside / path.name)


def replaced_by_a_loop(path: Path, outside: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to(path.name)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("shards/shard-00001.safetensors", replaced_by_a_link),
        ("shards", replaced_by_a_link),
        ("samples", replaced_by_a_link),
        ("target/embeddings.safetensors", replaced_by_a_link),
        ("shards/shard-00001.safetensors", replaced_by_a_loop),
        ("samples", replaced_by_a_loop),
    ],
)
def test_a_repair_moves_the_link_and_never_what_it_leads_to(made, job, cli, tmp_path, name, how):
    cache, outside = shutil.copytree(made, tmp_path / "cache"), tmp_path / "outside"
    outside.mkdir()
    how(cache / name, outside)
    (outside / ".half.tmp").write_bytes(b"not ours")
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in sorted(outside.rglob("*"))}
    code, out, _ = cli("verify", cache)
    assert code == 1
    assert ("leads out of the cache" if how is replaced_by_a_link else "cannot be followed") in out
    code, out, _ = cli("repair", cache, "--yes")
    assert (code, f"set aside: {name} ->" in out) == (1, True)
    assert (cache / "quarantine" / name.replace("/", "--")).is_symlink()
    code, _, err = cli("extract", *job, "--out", cache)
    assert code == 0, err
    assert {n: data for n, data in contents(cache).items() if not n.startswith("quarantine/")} == contents(made)
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in sorted(outside.rglob("*"))} == before


def test_a_quarantine_that_leads_out_of_the_cache_takes_nothing(made, cli, tmp_path):
    cache, outside = shutil.copytree(made, tmp_path / "cache"), tmp_path / "outside"
    outside.mkdir()
    (cache / "quarantine").symlink_to(outside)
    flip(shards(cache)[1], 70_000)
    before = contents(cache)
    code, _, err = cli("repair", cache, "--yes")
    assert (code, "leads out of the cache through a symbolic link" in err) == (1, True)
    assert contents(cache) == before
    assert not list(outside.iterdir())


@pytest.mark.parametrize("folder", ["samples", "shards", "target"])
def test_an_extraction_follows_no_folder_out_of_the_cache(job, cli, tmp_path, folder):
    """It removes half-written files, and writes: both would be done to somebody else's folder."""
    out, outside = tmp_path / "cache", tmp_path / "outside"
    for path in (out, outside):
        path.mkdir()
    (outside / ".x.tmp").write_bytes(b"not ours")
    (out / folder).symlink_to(outside)
    code, _, err = cli("extract", *job, "--out", out)
    assert (code, "leads out of the cache" in err, "Traceback" in err) == (1, True, False)
    assert list(outside.iterdir()) == [outside / ".x.tmp"]


def test_a_shard_that_the_disk_will_not_give_is_a_problem_among_the_others(made, cli, tmp_path, monkeypatch):
    """A bad sector: EIO at one place does not end the search."""
    cache = shutil.copytree(made, tmp_path / "cache")
    flip(shards(cache)[3], 70_000)
    bad, preadv = os.stat(shards(cache)[1]).st_ino, os.preadv

    def with_a_bad_sector(fd, buffers, offset, *flags):
        if os.fstat(fd).st_ino == bad and offset > 5000:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(fd, buffers, offset, *flags)

    monkeypatch.setattr(os, "preadv", with_a_bad_sector)
    code, out, _ = cli("verify", cache, "--json")
    monkeypatch.undo()
    found = {problem["shard"]: problem["problem"] for problem in json.loads(out)["problems"]}
    assert (code, sorted(found)) == (1, [1, 3])
    assert "the device reported an input/output error" in found[1]


def test_a_cache_that_cannot_be_looked_at_is_not_called_damaged(made, cli, tmp_path, monkeypatch):
    def refuse(path, *arguments):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr("cache_format.layout.manifest.open_for_reading", refuse)
    for command in (["verify", made], ["verify", made, "--quick"], ["repair", made]):
        code, _, err = cli(*command)
        assert (code, "permission denied" in err) == (2, True)
