"""A cache read while it is written: every batch that the whole cache would have given, whoever is killed meanwhile."""

from __future__ import annotations

import functools
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import commands
import pytest
import torch
import xxhash
from jobs import contents
from synthetic import write_cache

from cache_format import DFlashTargetBatch, FeatureCache, InputError, MismatchError, StorageError, WriterStoppedError
from cache_format.errors import CacheError
from cache_format.layout.follow_files import KeptWindow, read_done, write_done, write_window
from cache_format.storage.lock import LockedError, is_written, writing

STOPPED = 7
"""Exit code of the reader process where it is told that nobody writes."""

OPTIONS = {"batch_size": 3, "shuffle": True, "seed": 5, "window_shards": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A complete cache of 7 shards."""
    path = tmp_path_factory.mktemp("follow") / "cache"
    write_cache(path, [40 - n for n in range(40)], hidden=128, dtype="bfloat16", shard_bytes=128 << 10)
    return path


def digest(batch: DFlashTargetBatch) -> str:
    tensors = [batch.hidden_states.view(torch.int16), batch.input_ids, batch.loss_mask]
    return xxhash.xxh3_64_hexdigest(b"".join(t.contiguous().numpy().tobytes() for t in tensors))


def test_a_finished_cache_is_followed_shard_by_shard(folder):
    followed = FeatureCache.open(folder, follow=True)
    whole = FeatureCache.open(folder)
    assert followed.manifest == whole.manifest
    assert followed.num_shards >= 5
    assert torch.equal(followed.cache.get_input_embeddings().weight, whole.get_input_embeddings().weight)
    for epoch in range(2):
        shards = list(followed)
        assert [set(shard.index.shard.tolist()) for shard in shards] == [{n} for n in range(followed.num_shards)]
        assert sum(map(len, shards)) == len(whole)
        assert followed.epoch == epoch + 1
    assert torch.equal(shards[0][0].hidden_states, whole[int(shards[0].index.sample_id[0])].hidden_states)


@pytest.mark.parametrize("world", [1, 2])
def test_every_sample_once_an_epoch_in_another_order_each_and_resumed_exactly(folder, world, monkeypatch):
    def loaders(**more):
        each = []
        for rank in range(world):
            followed = FeatureCache.open(folder, follow=True)
            each.append(followed.loader(**OPTIONS, rank=rank, world_size=world, **more))
        return each

    def ids(batch: DFlashTargetBatch) -> list[tuple[int, ...]]:
        return [
            tuple(row[mask.bool()].tolist()) for row, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
        ]

    epochs = []
    for loader in loaders():
        epochs.append([[digest(b) for b in loader] for _ in range(2)])
        assert loader.epoch == 2
    assert len({len(epoch) for of_rank in epochs for epoch in of_rank}) == 1
    assert epochs[0][0] != epochs[0][1]
    seen = [row for loader in loaders() for batch in loader for row in ids(batch)]
    assert sorted(seen) == sorted(row for sample in FeatureCache.open(folder) for row in ids(sample))
    for stop in range(1, len(epochs[0][0]) + 1):
        for rank, loader in enumerate(loaders()):
            batches = iter(loader)
            for _ in range(stop):
                next(batches)
            state = json.loads(json.dumps(loader.state_dict()))
            again = loaders()[rank]
            again.load_state_dict(state)
            assert [digest(b) for b in again] == epochs[rank][0][stop:]
            # Left and iterated over again, it goes on as well.
            batches.close()
            assert [digest(b) for b in loader] == epochs[rank][0][stop:]


def test_a_state_of_another_cache_or_order_is_refused(folder, tmp_path):
    write_cache(tmp_path / "other", [30] * 20, hidden=128, dtype="bfloat16", shard_bytes=128 << 10)
    state = FeatureCache.open(folder, follow=True).loader(**OPTIONS).state_dict()
    with pytest.raises(MismatchError, match="fingerprint"):
        FeatureCache.open(tmp_path / "other", follow=True).loader(**OPTIONS).load_state_dict(state)
    with pytest.raises(InputError, match="window_shards"):
        FeatureCache.open(folder, follow=True).loader(3, window_shards=5).load_state_dict(state)
    with pytest.raises(InputError, match="no place 99"):
        FeatureCache.open(folder, follow=True).load_state_dict({**state, "shards_done": 99})


def test_a_filter_may_leave_nothing_of_some_shards(folder):
    loader = FeatureCache.open(folder, follow=True).loader(
        2, window_shards=1, filter=lambda index: index.sample_id == 11
    )
    with pytest.warns(UserWarning, match="some shards are passed over"):
        assert len(list(loader)) == 1


def test_what_cannot_be_followed_is_refused(folder, tmp_path):
    for bad in ({"keep_shards": -1}, {"patience": float("nan")}):
        with pytest.raises(InputError, match="keep_shards="):
            FeatureCache.open(folder, follow=True, **bad)
    for place in ([folder, folder], "s3://bucket/cache"):
        with pytest.raises(InputError, match="one cache in a folder"):
            FeatureCache.open(place, follow=True)
    with pytest.raises(InputError, match="follow=True"):
        FeatureCache.open(folder, keep_shards=2)
    with pytest.raises(MismatchError, match="hidden_size"):
        len(list(FeatureCache.open(folder, follow=True, expect={"hidden_size": 7})))
    with pytest.raises(InputError, match="window_shards"):
        FeatureCache.open(folder, follow=True).loader(2, window_shards=0)
    with pytest.raises(WriterStoppedError, match="there is no planned cache yet, and nobody"):
        next(iter(FeatureCache.open(tmp_path / "none", follow=True, patience=0.05)))


def test_readers_of_all_ranks_say_where_the_slowest_is(tmp_path):
    assert read_done(tmp_path) == 0
    write_done(tmp_path, 0, 1, 9)
    assert read_done(tmp_path) == 9
    write_done(tmp_path, 1, 2, 5)
    assert read_done(tmp_path) == 0, "rank 0 of 2 has not spoken"
    write_done(tmp_path, 0, 2, 7)
    assert read_done(tmp_path) == 5
    for bad in ("{", "[1]", '{"done": -1}', '{"done": "1"}', '{"done": 1e99}', "x" * 9999, "[" * 3000):
        (tmp_path / "follow" / "reader-1-of-2.json").write_text(bad)
        with pytest.raises(CacheError, match="reader-1-of-2"):
            read_done(tmp_path)
    (tmp_path / "follow" / "reader-0-of-999999.json").write_text('{"done": 1}')
    assert read_done(tmp_path) == 0
    write_window(tmp_path, KeptWindow(keep=3, epochs=1))
    (tmp_path / "link").symlink_to(tmp_path.parent)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "follow").symlink_to(tmp_path.parent)
    with pytest.raises(CacheError, match="leads out"):
        write_done(tmp_path / "other", 0, 1, 1)


def test_looking_for_the_writer_disturbs_none(tmp_path):
    assert not is_written(tmp_path)
    with writing(tmp_path):
        assert is_written(tmp_path)
        with pytest.raises(LockedError), writing(tmp_path):
            pass
    assert not is_written(tmp_path)


# -- with real processes ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def job(job) -> list[str]:
    return ["extract", *job, "--limit", "40", "--shard-size", "512KiB"]


@pytest.fixture(scope="module")
def whole(job, tmp_path_factory) -> Path:
    """That job's cache, made at once."""
    out = tmp_path_factory.mktemp("whole") / "cache"
    commands.made(*job, "--out", out)
    return out


def read(cache: Path, log: Path, epochs: int, keep_shards: int, pause: float) -> None:
    """A reader process: a line for each batch, a checkpoint after every fifth; goes on from the last checkpoint."""
    followed = FeatureCache.open(cache, follow=True, keep_shards=keep_shards, patience=1)
    loader, checkpoint, position = followed.loader(**OPTIONS), log.with_suffix(".state"), 0
    try:
        if checkpoint.exists():
            state = json.loads(checkpoint.read_text())
            position = state["position"]
            loader.load_state_dict(state["loader"])
        with log.open("a") as lines:
            while loader.epoch < epochs:
                for batch in loader:
                    lines.write(f"{position} {digest(batch)}\n")
                    lines.flush()
                    position += 1
                    if position % 5 == 0:
                        checkpoint.with_suffix(".new").write_text(
                            json.dumps({"position": position, "loader": loader.state_dict()})
                        )
                        os.replace(checkpoint.with_suffix(".new"), checkpoint)
                    time.sleep(pause)
    except WriterStoppedError:
        os._exit(STOPPED)
    os._exit(0)


def reader(cache: Path, log: Path, epochs: int = 1, keep_shards: int = 1, pause: float = 0.0) -> commands.Command:
    return commands.start("reader", before=functools.partial(read, cache, log, epochs, keep_shards, pause))


def expected(whole: Path, epochs: int) -> dict[str, str]:
    loader = FeatureCache.open(whole, follow=True).loader(**OPTIONS)
    each = (digest(batch) for _ in range(epochs) for batch in loader)
    return {str(position): found for position, found in enumerate(each)}


def given(log: Path) -> dict[str, str]:
    """What the readers got, by position; a position that was read twice was the same both times."""
    found: dict[str, str] = {}
    for line in log.read_text().splitlines():
        position, got = line.split()
        assert found.setdefault(position, got) == got
    return found


def shards(cache: Path) -> list[Path]:
    return list((cache / "shards").glob("shard-*.safetensors")) if (cache / "shards").is_dir() else []


def test_an_extraction_is_followed_to_its_end(job, whole, tmp_path):
    cache = tmp_path / "cache"
    reading = reader(cache, tmp_path / "log", epochs=2)
    commands.made(*job, "--out", cache)
    assert reading.wait() == 0, reading.stderr.read_text()
    assert given(tmp_path / "log") == expected(whole, 2)
    assert contents(cache) == contents(whole)


def test_the_disk_holds_a_window_and_any_process_may_be_killed(job, whole, tmp_path):
    """--keep 5, two epochs: writer and reader are killed by turns, and started again."""
    cache, log = tmp_path / "cache", tmp_path / "log"
    write = functools.partial(commands.start, *job, "--out", cache, "--keep", "5", "--epochs", "2")
    follow = functools.partial(reader, cache, log, epochs=2, pause=0.02)
    total, most, kills, stopped = len(expected(whole, 2)), 0, 0, 0
    writer, reading = write(), follow()
    deadline, next_kill = time.monotonic() + 120, 6
    while (writer.poll(), reading.poll()) != (0, 0):
        assert time.monotonic() < deadline, writer.stderr.read_text() + reading.stderr.read_text()
        most = max(most, len(shards(cache)))
        lines = len(log.read_text().splitlines()) if log.exists() else 0
        if lines >= next_kill and kills < 4:
            victim = (writer, reading)[kills % 2]
            victim.kill()
            assert victim.wait() == -signal.SIGKILL
            kills, next_kill = kills + 1, lines + total // 5
        if reading.poll() == STOPPED:
            stopped += 1
        if writer.poll() not in (None, 0):
            # Once the reader has been told, or is at its end.
            assert reading.wait() in (0, STOPPED), reading.stderr.read_text()
            stopped += reading.poll() == STOPPED
            writer, reading = write(), follow()
        elif reading.poll() not in (None, 0):
            reading = follow()
        time.sleep(0.01)
    assert kills == 4
    assert stopped >= 1
    assert given(log) == expected(whole, 2)
    assert most <= 5 + 3, "and what was being written"
    assert len(shards(cache)) <= 5
    for path in shards(cache):
        assert path.read_bytes() == (whole / "shards" / path.name).read_bytes()


def test_workers_share_a_window(job, whole, tmp_path):
    cache, log = tmp_path / "cache", tmp_path / "log"
    writer = commands.start(
        *job, "--out", cache, "--keep", "4", "--devices", "cpu,cpu", before=commands.workers_by_fork
    )
    reading = reader(cache, log)
    assert (reading.wait(), writer.wait()) == (0, 0), reading.stderr.read_text() + writer.stderr.read_text()
    assert given(log) == expected(whole, 1)
    assert len(shards(cache)) <= 4


def test_a_window_is_never_that_of_a_cache_begun_without(job, whole, cli, tmp_path):
    cache = tmp_path / "cache"
    commands.made(*job, "--out", cache, "--keep", "100")
    assert len(shards(cache)) == len(shards(whole))
    # Without it the cache is finished, and no reader can make it lose a shard.
    commands.made(*job, "--out", cache)
    assert contents(cache) == contents(whole)
    (cache / "index.arrow").unlink()
    from cache_format.layout.manifest import Manifest

    manifest = Manifest.read(cache)
    manifest.extracting(manifest.identity, files={k: v for k, v in manifest.files.items() if "/" in k}).write(cache)
    code, _, said = cli(*job, "--out", cache, "--keep", "2")
    assert code == 2
    assert "was begun without --keep" in said
    assert len(shards(cache)) == len(shards(whole))


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--epochs", "2"], "--epochs is for --keep"),
        (["--keep", "0"], "--keep"),
        (["--keep", "2", "--engine", "ray"], "--keep is for one machine"),
    ],
)
def test_a_window_that_cannot_be_is_refused(job, cli, tmp_path, options, names):
    code, _, said = cli(*job, "--out", tmp_path / "cache", *options)
    assert code == 2
    assert names in said
    assert not (tmp_path / "cache").exists()


def test_a_reader_that_wants_more_than_is_kept_is_told(folder):
    write_window(folder, KeptWindow(keep=3, epochs=1))
    try:
        followed = FeatureCache.open(folder, follow=True, keep_shards=2)
        with pytest.raises(InputError, match="its writer keeps 3 shards, and 4 are asked for"):
            next(iter(followed.loader(**OPTIONS)))
        loader = FeatureCache.open(folder, follow=True, keep_shards=1).loader(**OPTIONS)
        seen: Iterator[int] = (read_done(folder) for _ in loader)
        assert list(dict.fromkeys(seen))[:3] == [0, 1, 3]
        (folder / "follow").chmod(0o500)
        if os.geteuid():
            with pytest.raises(StorageError):
                next(iter(loader))
    finally:
        (folder / "follow").chmod(0o700)
        for path in (folder / "follow").iterdir():
            path.unlink()
        (folder / "follow").rmdir()
