"""verify, inspect, repair, export and recode with a cache at a URL: what they do with one on a disk."""

from __future__ import annotations

import json
from contextlib import contextmanager

import commands
import pytest
from commands import start, wait_for
from jobs import contents
from s3 import objects, put, upload_folder

from cache_format.layout.manifest import MANIFEST_NAME
from cache_format.layout.shard_layout import shard_name
from cache_format.storage.lease import leased
from cache_format.storage.store import Store


@pytest.fixture
def there(bucket, s3, made, quick) -> str:
    upload_folder(s3, bucket, made)
    return bucket


def test_verify_and_inspect(cli, there, made):
    code, out, err = cli("verify", there)
    assert (code, f"{there}: whole (full check" in out) == (0, True), err + out
    code, out, _ = cli("verify", there, "--quick", "--json")
    assert (code, json.loads(out)["whole"]) == (0, True)
    code, out, _ = cli("inspect", there, "--json")
    here = json.loads(cli("inspect", made, "--json")[1])
    assert json.loads(out) == {**here, "cache": there}


def test_show(cli, there, made):
    code, out, err = cli("show", there, "17", "--json")
    assert code == 0, err
    assert {**json.loads(out), "cache": ""} == {**json.loads(cli("show", made, "17", "--json")[1]), "cache": ""}


def test_a_flipped_bit_is_found_and_mended(cli, there, s3, made, arguments):
    data = bytearray((made / shard_name(1)).read_bytes())
    data[len(data) // 2] ^= 4
    put(s3, there, shard_name(1), bytes(data))
    assert cli("verify", there, "--quick")[0] == 0
    code, out, _ = cli("verify", there)
    assert code == 1
    assert "shards/shard-00001.safetensors (shard 1, sample" in out
    code, out, _ = cli("repair", there, "--dry-run")
    assert (code, "set aside: shards/shard-00001.safetensors" in out) == (1, True)
    assert shard_name(1) in objects(s3, there)
    assert cli("repair", there, "--yes")[0] == 1
    after = objects(s3, there)
    assert after["quarantine/shards--shard-00001.safetensors"] == bytes(data)
    assert shard_name(1) not in after
    assert cli(*arguments)[0] == 0
    after = objects(s3, there)
    assert {k: v for k, v in after.items() if not k.startswith("quarantine/")} == contents(made)
    assert cli("verify", there)[0] == 0


def test_a_part_is_verified_and_gone_on_with(cli, there, s3, made, tmp_path, monkeypatch):
    """What was found right counts while the store says that it is the same object."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    flipped = bytearray((made / shard_name(1)).read_bytes())
    flipped[len(flipped) // 2] ^= 4
    put(s3, there, shard_name(1), bytes(flipped))
    code, out, _ = cli("verify", there, "--shards", "2-4", "--json")
    assert (code, json.loads(out)["checked"]) == (0, "2-4")
    code, out, _ = cli("verify", there, "--resume", "--json")
    assert (code, {problem["shard"] for problem in json.loads(out)["problems"]}) == (1, {1})
    put(s3, there, shard_name(1), (made / shard_name(1)).read_bytes())
    flipped = bytearray((made / shard_name(3)).read_bytes())
    flipped[len(flipped) // 2] ^= 4
    put(s3, there, shard_name(3), bytes(flipped))
    code, out, _ = cli("verify", there, "--resume", "--json")
    found = json.loads(out)
    assert (code, {problem["shard"] for problem in found["problems"]}) == (1, {3}), "another object of that name"
    assert found["resumed"] == found["of_shards"] - 2


@pytest.mark.parametrize("name", ["index.arrow", "samples/samples-00000.arrow", MANIFEST_NAME, "target/config.json"])
def test_other_damage_is_mended(name, cli, there, s3, made, arguments):
    data = bytearray((made / name).read_bytes())
    data[len(data) // 2] ^= 1
    put(s3, there, name, bytes(data))
    assert cli("verify", there)[0] == 1
    code, _, err = cli("repair", there, "--yes")
    assert code in (0, 1), err
    if code:
        code, _, err = cli(*arguments)
        assert code == 0, err
    after = objects(s3, there)
    assert {k: v for k, v in after.items() if not k.startswith("quarantine/")} == contents(made)


def test_missing_and_extra_files_are_found(cli, there, s3):
    Store(there).remove(shard_name(2))
    put(s3, there, "shards/stranger", b"")
    code, out, _ = cli("verify", there)
    assert code == 1
    assert "shards/shard-00002.safetensors (shard 2): is missing" in out
    assert "shards/stranger: is not a shard" in out


def test_export(cli, there, made, tmp_path):
    assert cli("export", there, tmp_path / "a", "--to", "specforge")[0] == 0
    assert cli("export", made, tmp_path / "b", "--to", "specforge")[0] == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    code, _, err = cli("export", there, there + "-out", "--to", "specforge")
    assert (code, "writes to a local folder" in err) == (2, True)


def test_recode(cli, there, made, tmp_path):
    assert cli("recode", there, tmp_path / "a", "--codec", "zbits")[0] == 0
    assert cli("recode", made, tmp_path / "b", "--codec", "zbits")[0] == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_recode_to_a_url(cli, made, bucket, s3, proxy, quick, tmp_path):
    local, options = tmp_path / "local", ["--codec", "zbits", "--threads", "1"]
    assert cli("recode", made, local, *options)[0] == 0
    command = ["recode", made, bucket, *options, "--scratch", tmp_path / "scratch"]
    killed = start(*command)
    wait_for(lambda: sum("/shards/" in path for m, path, _ in proxy.requests if m == "PUT") > 2)
    killed.kill()
    killed.communicate()
    code, out, err = cli(*command, "--json")
    assert code == 0, err
    assert json.loads(out)["done_shards"] > 0
    assert objects(s3, bucket) == contents(local)
    assert not [p for p in (tmp_path / "scratch").rglob("*") if p.is_file()], "nothing is left on the disk"
    assert cli("recode", made, bucket, "--codec", "fp8", "--scratch", tmp_path / "scratch")[0] == 2


def test_a_recode_to_a_url_that_another_began_meanwhile(cli, made, bucket, s3, quick, tmp_path, monkeypatch):
    before = {}

    @contextmanager
    def late(*arguments):
        commands.made("recode", made, bucket, "--codec", "zbits", "--scratch", tmp_path / "first")
        before.update(objects(s3, bucket))
        with leased(*arguments) as allowed:
            yield allowed

    monkeypatch.setattr("cache_format.upkeep.recode_to_store.leased", late)
    code, _, err = cli("recode", made, bucket, "--codec", "fp8", "--scratch", tmp_path / "second")
    assert (code, "codec" in err) == (2, True), err
    assert before
    assert objects(s3, bucket) == before


def test_recompute(cli, there, tiny_target):
    code, out, err = cli("verify", there, "--recompute", "2", "--target", tiny_target, "--device", "cpu")
    assert (code, "recomputed 2 samples" in out) == (0, True), err
