"""verify of a part of the shards, by several workers, and going on after a kill: it claims nothing more."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import commands
import pytest
from jobs import contents
from synthetic import write_cache

from cache_format import InputError
from cache_format.upkeep.check_shard import ShardCheck
from cache_format.upkeep.verify import verify
from cache_format.upkeep.which_shards import WhichShards, as_ranges, format_ranges, parse_ranges

SHARDS = 40


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """Of 40 shards or so."""
    path = tmp_path_factory.mktemp("part") / "cache"
    write_cache(path, [40] * SHARDS * 5, dtype="bfloat16", hidden=64, shard_bytes=64 << 10)
    assert verify(path, quick=True).of_shards >= SHARDS
    return path


@pytest.fixture
def state(tmp_path, monkeypatch) -> Path:
    """The user's cache folder, below which the state lies."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def shard(cache: Path, number: int) -> Path:
    return cache / "shards" / f"shard-{number:05d}.safetensors"


def damage(cache: Path, number: int) -> None:
    """A bit of its last sample, its time as before."""
    path = shard(cache, number)
    before, data = path.stat(), bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def report(*arguments: object, **environment: str) -> tuple[int, dict]:
    code, out, errors = commands.run("verify", *arguments, "--json", **environment)
    assert code in (0, 1), errors
    return code, json.loads(out)


# -- which shards -----------------------------------------------------------------------------------------------------


def test_a_share_is_drawn_the_same_way_everywhere():
    """By the text "seed:number": pinned, since a job on another machine goes on with it."""
    assert WhichShards(share=0.01).of(1000) == [100, 124, 183, 198, 421, 544, 723, 730, 756, 921]
    drawn = WhichShards(share=0.1, seed=3).of(1000)
    assert len(drawn) == 100 == len(set(drawn))
    assert drawn == sorted(drawn)
    assert set(drawn) < set(WhichShards(share=0.2, seed=3).of(1000))
    assert drawn != WhichShards(share=0.1, seed=4).of(1000)
    assert WhichShards(share=0.07).of(100) == WhichShards(share=0.061).of(100), "rounded up"
    assert len(WhichShards(share=1e-9).of(5)) == 1
    assert WhichShards().of(3) == [0, 1, 2]
    assert WhichShards(ranges=((2, 4), (8, 8))).of(10) == [2, 3, 4, 8]
    assert set(WhichShards(share=0.5, ranges=((10, 19),)).of(40)) < set(range(10, 20))


def test_ranges_are_read_and_written():
    assert parse_ranges("0-999") == ((0, 999),)
    assert parse_ranges("7,3-5,4-6") == ((3, 7),)
    assert format_ranges(as_ranges([0, 1, 2, 9, 11, 12])) == "0-2,9,11-12"
    for wrong in ("", "5-3", "a", "1-", "-1", "1--2", "1,,2", "²", "1 - 2", "9" * 20):
        with pytest.raises(InputError, match="--shards"):
            parse_ranges(wrong)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--sample", "0"], "--sample"),
        (["--sample", "1.5"], "--sample"),
        (["--sample", "-0.1"], "--sample"),
        (["--sample", "nan"], "--sample"),
        (["--seed", "3"], "--sample"),
        (["--sample", "0.1", "--seed", "-1"], "--seed"),
        (["--shards", "10-5"], "--shards"),
        (["--shards", "0-99999"], "has shards 0-"),
        (["--shards", "x"], "--shards"),
        (["--resume", "--quick"], "--resume"),
        (["--state", "here"], "--resume"),
        (["--num-workers", "2"], "--engine ray"),
    ],
)
def test_nonsense_is_refused(cache, cli, arguments, told):
    code, out, errors = cli("verify", cache, *arguments)
    assert (code, out) == (2, "")
    assert told in errors
    assert "Traceback" not in errors


# -- a part proves a part ---------------------------------------------------------------------------------------------


def test_a_damaged_shard_is_found_in_the_sample_and_only_there(cache, cli, tmp_path):
    which = WhichShards(share=0.25, seed=5)
    copy = shutil.copytree(cache, tmp_path / "cache")
    inside, of_shards = which.of(verify(copy, quick=True).of_shards), verify(copy, quick=True).of_shards
    damage(copy, next(n for n in range(of_shards) if n not in inside))
    code, out, _ = cli("verify", copy, "--sample", "0.25", "--seed", "5", "--json")
    found = json.loads(out)
    assert code == 0, found["problems"]
    assert (found["shards"], found["of_shards"]) == (len(inside), of_shards)
    assert found["checked"] == format_ranges(as_ranges(inside))
    assert f"nothing of the other {of_shards - len(inside)}" in found["proves"]
    code, out, _ = cli("verify", copy, "--sample", "0.25", "--seed", "5")
    assert "no problem in what was checked" in out
    assert ": whole" not in out

    damage(copy, inside[2])
    code, out, _ = cli("verify", copy, "--sample", "0.25", "--seed", "5", "--json")
    found = json.loads(out)
    assert code == 1
    assert {problem["shard"] for problem in found["problems"]} == {inside[2]}
    assert "proves" not in found, "it proves nothing"
    assert cli("verify", copy, "--shards", str(inside[2]))[0] == 1
    assert cli("verify", copy, "--shards", f"{inside[0]}-{inside[1]}", "--quick")[0] == 0


def test_what_is_no_shard_is_looked_at_whatever_the_part(cache, cli, tmp_path):
    copy = shutil.copytree(cache, tmp_path / "cache")
    path = copy / "target" / "embeddings.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    code, out, _ = cli("verify", copy, "--shards", "0")
    assert (code, "embeddings" in out) == (1, True)


# -- several workers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["torchrun", "slurm array"])
def test_two_workers_check_every_shard_once(cache, tmp_path, kind):
    copy = shutil.copytree(cache, tmp_path / "cache")
    damage(copy, 11)

    def environment(rank: int) -> dict[str, str]:
        if kind == "torchrun":
            return {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_ADDR": "here"}
        return {"SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_ID": str(rank), "SLURM_ARRAY_JOB_ID": "7"}

    running = [commands.start("verify", copy, "--json", **environment(rank)) for rank in range(2)]
    reports = [json.loads(process.communicate()[0]) for process in running]
    assert sorted(process.returncode for process in running) == [0, 1]
    assert sum(one["shards"] for one in reports) == reports[0]["of_shards"]
    checked = [set(WhichShards(ranges=parse_ranges(one["checked"])).of(1000)) for one in reports]
    assert not checked[0] & checked[1]
    assert [one["whole"] for one in reports] == [True, False], "shard 11 is rank 1's"
    assert "nothing of the other" in reports[0]["proves"]


# -- going on ---------------------------------------------------------------------------------------------------------


def slowly() -> None:
    """In the command's process: a shard takes a twentieth of a second, and what was found is kept after each."""
    import cache_format.upkeep.state
    import cache_format.upkeep.verify

    cache_format.upkeep.state._SECONDS_BETWEEN = 0.0
    cache_format.upkeep.state._SHARE_OF_TIME = 0

    class Slow(ShardCheck):
        def __call__(self, number):
            time.sleep(0.05)
            return super().__call__(number)

    cache_format.upkeep.verify.ShardCheck = Slow


def killed_after(count: int, state: Path, *arguments: object, number: int = signal.SIGKILL, **environment: str) -> None:
    """Start a verification, and kill it once so many shards are in its state."""
    process = commands.start("verify", *arguments, before=slowly, XDG_CACHE_HOME=str(state), **environment)

    def kept() -> bool:
        assert process.poll() is None, process.communicate()
        return sum(len(json.loads(path.read_text())["shards"]) for path in state.rglob("checked-*.json")) >= count

    commands.wait_for(kept)
    process.send_signal(number)
    assert process.wait() == (-9 if number == signal.SIGKILL else 143)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_verification_goes_on(cache, state, number):
    before = contents(cache)
    killed_after(8, state, cache, "--resume", number=number)
    code, found = report(cache, "--resume", XDG_CACHE_HOME=str(state))
    assert (code, found["shards"]) == (0, found["of_shards"])
    assert 8 <= found["resumed"] < found["of_shards"]
    assert 0 < found["bytes_read"] < found["bytes"]
    assert "checked by earlier runs since 20" in found["proves"]
    assert not list(state.rglob("checked-*")), "all is right: the next one begins anew"
    code, found = report(cache, "--resume", XDG_CACHE_HOME=str(state))
    assert (code, found["resumed"], found["bytes_read"]) == (0, 0, found["bytes"])
    assert contents(cache) == before


def test_workers_go_on_in_another_number(cache, state):
    killed_after(4, state, cache, "--resume", RANK="1", WORLD_SIZE="2", LOCAL_RANK="0")
    code, first = report(cache, "--resume", RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", XDG_CACHE_HOME=str(state))
    assert (code, first["resumed"]) == (0, 0)
    code, found = report(cache, "--resume", XDG_CACHE_HOME=str(state))
    assert (code, found["shards"]) == (0, found["of_shards"])
    assert found["resumed"] >= first["shards"] + 4
    assert not list(state.rglob("checked-*"))


def test_what_was_found_damaged_or_has_changed_since_is_checked_again(cache, state, tmp_path):
    copy = shutil.copytree(cache, tmp_path / "cache")
    damage(copy, 3)
    for _ in range(2):
        code, found = report(copy, "--resume", XDG_CACHE_HOME=str(state))
        assert (code, {problem["shard"] for problem in found["problems"]}) == (1, {3})
    assert found["resumed"] == found["of_shards"] - 1
    shutil.copy(shard(cache, 3), shard(copy, 3))
    path = shard(copy, 5)
    path.write_bytes(path.read_bytes()[:-20] + b"x" * 20)
    code, found = report(copy, "--resume", XDG_CACHE_HOME=str(state))
    assert (code, {problem["shard"] for problem in found["problems"]}) == (1, {5}), "written since: another time"
    shutil.copy(shard(cache, 5), path)
    code, found = report(copy, "--resume", XDG_CACHE_HOME=str(state))
    assert (code, found["resumed"]) == (0, found["of_shards"] - 1)


def test_a_state_belongs_to_one_cache(cache, cli, state, tmp_path):
    """A copy lies on another disk; a cache that was made anew is another."""
    copy = shutil.copytree(cache, tmp_path / "cache")
    damage(copy, 3)
    assert cli("verify", copy, "--resume", "--state", tmp_path / "mine")[0] == 1
    code, _, errors = cli("verify", cache, "--resume", "--state", tmp_path / "mine")
    assert (code, "another cache" in errors, "--state" in errors) == (2, True, True)
    shutil.rmtree(copy)
    write_cache(copy, [30] * 9, dtype="bfloat16", hidden=64)
    code, _, errors = cli("verify", copy, "--resume", "--state", tmp_path / "mine")
    assert (code, "manifest" in errors) == (2, True)
    (tmp_path / "mine" / "checked-0.json").write_text("{")
    code, _, errors = cli("verify", copy, "--resume", "--state", tmp_path / "mine")
    assert (code, "is not the state of a verification" in errors) == (2, True)


def test_nothing_is_kept_of_shards_that_had_nothing_right_to_be_compared_with(cache, cli, state, tmp_path):
    copy = shutil.copytree(cache, tmp_path / "cache")
    path = next((copy / "samples").iterdir())
    data = bytearray(path.read_bytes())
    data[3000] ^= 1
    path.write_bytes(data)
    assert cli("verify", copy, "--resume")[0] == 1
    assert not list(state.rglob("checked-*"))


def test_a_state_that_cannot_be_written_is_told_before_the_work(cache, cli, tmp_path):
    (tmp_path / "file").write_text("mine")
    code, out, errors = cli("verify", cache, "--resume", "--state", tmp_path / "file")
    assert (code, out) == (2, "")
    assert "Traceback" not in errors
    assert (tmp_path / "file").read_text() == "mine"
