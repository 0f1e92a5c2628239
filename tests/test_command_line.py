"""The manifest keeps the command that made the cache: to be run again, without secrets, and no part of the identity."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import commands
import pytest
import yaml
from jobs import contents, on

from cache_format.layout.manifest import Manifest
from extractor.cli.command_line import this_command, without_secrets


def test_it_can_be_run_again_from_anywhere(small_job, tmp_path, cli, monkeypatch):
    """inspect and repair print it; what it makes, run by a shell from another folder, are the same bytes."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    shutil.copy(small_job[small_job.index("--data") + 1], "train it.jsonl")
    job = on(small_job, "train it.jsonl")
    assert cli(*job, "--out", "../cache")[0] == 0
    cache = tmp_path / "cache"
    command = Manifest.read(cache).command
    assert command.arguments == [*job, "--out", "../cache"]
    assert command.folder == str(tmp_path / "here")
    assert command.paths["train it.jsonl"] == str(tmp_path / "here" / "train it.jsonl")
    assert command.paths["../cache"] == str(cache)
    before = contents(cache)

    shell = command.shell()
    assert shlex.split(shell)[:3] == ["cd", str(tmp_path / "here"), "&&"]
    monkeypatch.chdir("/")
    assert shell in cli("inspect", cache)[1]
    assert json.loads(cli("inspect", cache, "--json")[1])["command"]["arguments"] == command.arguments
    shard = cache / "shards" / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    code, _, errors = cli("repair", cache, "--yes")
    assert (code, f"now run this again; it makes what is missing: {shell}\n" in errors) == (1, True)
    code, out, _ = cli("verify", cache)
    assert (code, f"run its command again: {shell}" in out) == (1, True)
    _, folder, _, *again = shlex.split(shell)
    monkeypatch.chdir(folder)
    assert cli(*again[1:])[0] == 0
    shutil.rmtree(cache / "quarantine")
    assert contents(cache) == before
    moved = cache.rename(tmp_path / "moved")
    shard = moved / "shards" / "shard-00001.safetensors"
    shard.unlink()
    assert f"(with {moved} in place of the OUT of then)" in cli("repair", moved, "--yes")[2]


def test_it_can_be_printed_as_a_file_for_config(small_job, tmp_path, cli, monkeypatch):
    """What a file said and what the command line said, together; the same bytes come of it in another folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    shutil.copy(small_job[small_job.index("--data") + 1], "train it.jsonl")
    job = on(small_job, "train it.jsonl")
    at = job.index("--target")
    Path("run.yaml").write_text(f"target: {job[at + 1]}\nlimit: 1000\nsystem-prompt: 'token: abc: é'\n")
    given = [*job[:at], *job[at + 2 :], "--config", "run.yaml", "--data", "train it.jsonl:0.5"]
    assert cli(*given, "--out", "../cache")[0] == 0
    cache = tmp_path / "cache"
    printed = cli("inspect", cache, "--print-config")[1]
    config = yaml.safe_load(printed)
    assert printed.startswith("# dflash-cache extract --config THIS_FILE\n# *** stands for")
    assert config["data"] == [str(tmp_path / "here" / "train it.jsonl"), f"{tmp_path / 'here' / 'train it.jsonl'}:0.5"]
    assert config["out"] == str(cache)
    assert "config" not in config

    (tmp_path / "printed.yaml").write_text(printed.replace("***", "abc:"))
    monkeypatch.chdir("/")
    code, _, errors = cli("extract", "--config", tmp_path / "printed.yaml", "--out", tmp_path / "again")
    assert code == 0, errors
    once, again = contents(cache), contents(tmp_path / "again")
    # The manifest names its sources as they were given.
    assert {name: again[name] for name in set(again) - {"manifest.json"}} == {
        name: once[name] for name in set(once) - {"manifest.json"}
    }
    assert Manifest.read(tmp_path / "again").fingerprint == Manifest.read(cache).fingerprint


def test_a_cache_of_no_command_says_that_it_cannot_be_printed(made, tmp_path, cli):
    cache = shutil.copytree(made, tmp_path / "cache")
    replace(Manifest.read(cache), command=None).write(cache)
    code, _, errors = cli("inspect", cache, "--print-config")
    assert (code, "does not have the options by name" in errors) == (2, True)


def test_another_spelling_resumes_and_the_first_is_kept(small_job, tmp_path, cli):
    cache = tmp_path / "cache"
    assert cli(*small_job, "--out", cache)[0] == 0
    first, identity = Manifest.read(cache).command, Manifest.read(cache).identity
    (cache / "shards" / "shard-00000.safetensors").unlink()
    assert cli("repair", cache, "--yes")[0] == 1
    assert cli(*small_job, f"--out={cache}", "--num-draft-layers", "2")[0] == 0
    assert Manifest.read(cache).command == first
    assert not [value for value in identity.values() if str(cache) in str(value)]


def test_of_a_recoded_cache_it_is_recode(made, tmp_path, cli):
    assert cli("recode", made, tmp_path / "copy", "--codec", "zbits")[0] == 0
    command = Manifest.read(tmp_path / "copy").command
    assert command.arguments == ["recode", str(made), str(tmp_path / "copy"), "--codec", "zbits"]
    assert Manifest.read(made).command.arguments[0] == "extract"


def test_workers_keep_the_command_and_not_their_own(small_job, tmp_path):
    out = tmp_path / "cache"
    code, _, errors = commands.run(*small_job, "--out", out, "--devices", "cpu,cpu", before=commands.workers_by_fork)
    assert code == 0, errors
    assert Manifest.read(out).command.arguments == [*small_job, "--out", str(out), "--devices", "cpu,cpu"]


SECRETS = [
    ("s3://AKIAIOSFODNN7EXAMPLE:wJalrXUtnFEMI@bucket/data", "s3://***@bucket/data"),
    ("https://user:hunter2@host/train.jsonl", "https://***@host/train.jsonl"),
    ("https://host/train.jsonl?X-Amz-Signature=abcdef&X-Amz-Credential=1", "https://host/train.jsonl?***"),
    ('{"api_key": "hunter2", "enable_thinking": false}', '{"api_key": ***, "enable_thinking": false}'),
    ("{'token': 'hunter2'}", "{'token': ***}"),
    ("aws_secret_access_key=hunter2", "aws_secret_access_key=***"),
    ("password: hunter2", "password: ***"),
    ("hf_abcdefghijklmnopqrstuv", "***"),
    ("Authorization: Bearer hunter2", "Authorization: ***"),
]
KEPT = [
    *("--batch-tokens", "--batch-tokens=8192", "--min-loss-tokens=3", "chat.jsonl:0.5", "owner/name:train_sft:0.1"),
    *("s3://bucket/cache", "prompt=instruction,response=output", "/data/tokens.jsonl", "logits-topk=64"),
    *('{"enable_thinking": false}', "You are the author of hf_. Keep secrets.", "C:\\key"),
]


@pytest.mark.parametrize(("given", "kept"), [*SECRETS, *((one, one) for one in KEPT)])
def test_secrets_are_left_out(given, kept):
    found = without_secrets(given)
    assert "hunter2" not in found
    assert found.replace("Bearer ***", "***").replace("*** ***", "***") == kept


def test_paths_are_found_in_what_was_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl", "c:0.5", "template.jinja"):
        Path(name).touch()
    given = ["extract", "--data", "a.jsonl:0.5", "--data=b.jsonl:train:0.1", "--data", "c:0.5", "--out", "~/new"]
    command = this_command([*given, "--chat-template", "template.jinja", "--system-prompt", "x" * 5000, "--limit", "3"])
    assert command.paths == {
        **{name: str(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "c:0.5", "template.jinja")},
        "~/new": os.path.expanduser("~/new"),
    }


def test_a_cache_of_no_command(made, tmp_path):
    """Of an earlier version, or made by a program: nothing is written in the manifest's place for it."""
    from synthetic import write_cache

    write_cache(tmp_path / "c", [3, 4], dtype="float32", hidden=8)
    assert b"command" not in (tmp_path / "c" / "manifest.json").read_bytes()
    assert Manifest.read(tmp_path / "c").command is None
