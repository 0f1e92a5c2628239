"""append: new rows of a finished job become a further cache beside its own, and both open as one."""

from __future__ import annotations

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from jobs import contents, on

from cache_format import FeatureCache
from cache_format.layout.collection import member, read_collection, write_collection
from cache_format.layout.manifest import Manifest
from extractor.config import ExtractOptions
from extractor.job.append import add_to_collection

pytestmark = pytest.mark.usefixtures("loaded_once")


def rows(path: Path, name: str, count: int) -> Path:
    turns = [("user", f"tell me of {name}"), ("assistant", f"{name} is one two three " * 30)]
    each = [{"messages": [{"role": role, "content": f"{n} {text}"} for role, text in turns]} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in each))
    return path


@pytest.fixture
def first(small_job, cli, tmp_path) -> Path:
    out = tmp_path / "chat"
    assert cli(*small_job[:-2], "--loss-on", "all", "--codec", "fp8", "--out", out)[0] == 0
    return out


def test_new_rows_become_the_cache_that_extract_makes_of_them_and_the_first_is_untouched(
    first, small_job, cli, tmp_path
):
    before = contents(first)
    new = rows(tmp_path / "new.jsonl", "frogs", 5)
    arguments = ("append", first, "--data", new, "--out", tmp_path / "chat-2", "--device", "cpu")
    code, _, said = cli(*arguments)
    assert code == 0, said
    assert "collection.json: lists it" in said
    alone = [*on(small_job[:-2], new), "--loss-on", "all", "--codec", "fp8", "--out", tmp_path / "alone"]
    assert cli(*alone)[0] == 0
    assert contents(tmp_path / "chat-2") == contents(tmp_path / "alone")
    assert contents(first) == before

    listed = (tmp_path / "collection.json").read_bytes()
    code, _, said = cli(*arguments)
    assert (code, (tmp_path / "collection.json").read_bytes()) == (0, listed)
    assert "already complete" in said

    more = rows(tmp_path / "more.jsonl", "newts", 3)
    assert cli("append", tmp_path, "--data", more, "--out", tmp_path / "chat-3", "--device", "cpu")[0] == 0
    whole, parts = FeatureCache.open(tmp_path), [FeatureCache.open(tmp_path / f"chat{n}") for n in ("", "-2", "-3")]
    assert len(whole) == 6 + 5 + 3
    assert torch.equal(whole[6].hidden_states, parts[1][0].hidden_states)
    assert torch.equal(whole[13].input_ids, parts[2][2].input_ids)


def test_caches_that_are_added_at_the_same_moment_are_all_listed(first, tmp_path):
    names = [f"chat-{number}" for number in range(8)]
    for name in names:
        shutil.copytree(first, tmp_path / name)
    gate = threading.Barrier(len(names))

    def add(name: str) -> None:
        gate.wait()
        add_to_collection(first, tmp_path / name)

    with ThreadPoolExecutor(len(names)) as threads:
        list(threads.map(add, names))
    assert sorted(listed.name for listed in read_collection(tmp_path / "collection.json")) == sorted(["chat", *names])
    assert not list(tmp_path.glob(".collection*"))


@pytest.fixture
def collection(first, tmp_path) -> Path:
    """A collection of two caches; made of copies, which takes no target."""
    shutil.copytree(first, tmp_path / "other")
    (tmp_path / "other" / ".lock").unlink(missing_ok=True)
    path = tmp_path / "collection.json"
    write_collection(path, [member(tmp_path / name, path) for name in ("chat", "other")])
    return tmp_path


def test_commands_on_a_collection_speak_of_each_cache(collection, cli):
    code, told, _ = cli("inspect", collection)
    assert code == 0
    assert "2 caches, 12 samples" in told
    assert told.count("complete") == 2
    assert json.loads(cli("inspect", collection, "--json")[1])["totals"]["samples"] == 12
    code, told, _ = cli("verify", collection / "collection.json", "--quick")
    assert code == 0
    assert told.count(": whole") == 2
    assert "all whole" in told
    assert json.loads(cli("verify", collection, "--json")[1])["whole"]
    for command in (["repair"], ["show", 0], ["recode", collection / "new", "--codec", "zbits"]):
        code, _, said = cli(command[0], collection, *command[1:])
        assert code == 2
        assert "name one of them" in said
        assert str(collection / "other") in said


def test_verify_finds_what_is_wrong_with_any_cache_of_a_collection(collection, cli):
    shard = next((collection / "other" / "shards").iterdir())
    shard.write_bytes(shard.read_bytes()[:-1])
    code, told, _ = cli("verify", collection, "--quick")
    assert code == 1
    assert "1 not whole" in told
    assert f"repair {collection / 'other'}" in told
    manifest = Manifest.read(collection / "other")
    manifest.extracting({**manifest.identity, "limit": 99}, files={}).write(collection / "other")
    assert "another cache than the one that collection.json lists" in cli("verify", collection, "--quick")[1]
    shutil.rmtree(collection / "other")
    code, told, _ = cli("verify", collection, "--json")
    assert (code, [c["whole"] for c in json.loads(told)["caches"]]) == (1, [True, False])


@pytest.mark.parametrize("case", ["target", "template", "itself", "elsewhere", "unfinished", "strangers", "no cache"])
def test_what_cannot_be_appended_is_refused_before_anything_is_written(first, cli, tmp_path, tiny_target, case):
    new, out = rows(tmp_path / "new.jsonl", "frogs", 2), tmp_path / "chat-2"
    arguments: list[object] = []
    if case == "target":
        other = shutil.copytree(tiny_target, tmp_path / "target")
        config = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
        arguments, names = ["--target", other], "target.config"
    elif case == "template":
        (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
        arguments, names = ["--chat-template", tmp_path / "t.jinja"], "chat_template"
    elif case == "itself":
        out, names = first, "lie side by side"
    elif case == "elsewhere":
        out, names = tmp_path / "sub" / "chat-2", "lie side by side"
    elif case == "unfinished":
        manifest = Manifest.read(first)
        manifest.extracting(manifest.identity, files={}).write(first)
        names = "is not complete"
    elif case == "strangers":
        shutil.copytree(first, tmp_path / "other")
        write_collection(tmp_path / "collection.json", [member(tmp_path / "other", tmp_path / "collection.json")])
        names = "lists other, and not chat"
    else:
        first, names = tmp_path, "is not a feature cache"
    before = contents(tmp_path)
    code, _, said = cli("append", first, "--data", new, "--out", out, "--device", "cpu", *arguments)
    assert code in (1, 2) if case == "no cache" else code == 2
    assert names in said
    assert contents(tmp_path) == before


def test_all_that_decides_a_byte_comes_from_the_manifest(first, small_job, tiny_target, tmp_path):
    from extractor.config import PrepareOptions, TargetOptions
    from extractor.job.append import options_like

    stored = Manifest.read(first)
    identity = {**stored.identity, "turns": "each", "system_prompt": "be kind", "compile": True}
    identity |= {"chat_template_kwargs": {"enable_thinking": False}, "template_date": "2026-01-31", "batch_tokens": 77}
    changed = stored.extracting(identity, capture={"last_hidden_states": True, "logits_topk": 4})
    options = options_like(
        changed,
        target=TargetOptions(name="t", device="cpu"),
        prepare=PrepareOptions(limit=3),
        out=tmp_path / "out",
        data=(),
    )
    assert isinstance(options, ExtractOptions)
    assert options.target.compile
    assert options.target.target_layer_ids == (0, 3)
    assert options.prepare.template_kwargs == {"enable_thinking": False}
    prepare = options.prepare
    assert (prepare.turns, prepare.system_prompt, prepare.template_date) == ("each", "be kind", "2026-01-31")
    assert (prepare.limit, prepare.max_length, prepare.loss_on) == (3, 32, "all")
    assert (options.plan.batch_tokens, options.plan.shard_bytes) == (77, 64 << 10)
    assert (options.capture.logits_topk, options.codec, options.target.dtype) == (4, "fp8", "float32")
