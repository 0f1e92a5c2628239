"""--keep: the disk holds a window of shards, which goes on as readers go on; see layout/follow_files.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from cache_format.errors import InputError, StorageError
from cache_format.layout.follow_files import FOLDER, KeptWindow, forget_window, read_done, read_window, write_window
from cache_format.layout.shard_layout import finished_shards, shard_name
from extractor.job.run_shards import RunStats, ShardRunner
from extractor.job.worker import Worker

POLL_SECONDS = 0.02


def begin_window(cache: Path, window: KeptWindow | None, worker: Worker) -> None:
    """Say in the cache what is kept of it; None: everything.

    Raises:
        InputError: it has shards that were to be kept.
    """
    if window is None:
        if worker.leads and (cache / FOLDER).exists():
            forget_window(cache)
        return
    if not worker.leads:
        return
    if read_window(cache) is None and _finished(cache):
        raise InputError(
            f"{cache}: was begun without --keep, which would remove finished shards; leave out --keep, or name another "
            "--out"
        )
    write_window(cache, window)


def run_window(
    runner: ShardRunner,
    window: KeptWindow,
    worker: Worker,
    report: Callable[[RunStats], None],
    say: Callable[[str], None],
) -> RunStats:
    """Make this worker's shards of each turn as readers come near it, until those of the last turn are there.

    Raises:
        DFlashCacheError: as :meth:`ShardRunner.run`.
    """
    cache, shards = runner.cache, len(runner.plan)
    last, waits, writing = shards * window.epochs, False, dict[int, Future[tuple[int, float]]]()
    with runner.begin(list(range(shards)), report) as making:
        while True:
            turns = range(read_done(cache), last)[: window.keep]
            wanted = list(dict.fromkeys(turn % shards for turn in turns))
            there = _finished(cache)
            if worker.leads:
                _remove(cache, there - set(wanted))
            for number in [number for number, future in writing.items() if future.done()]:
                # Here, not at the next shard, which may be long to wait for.
                writing.pop(number).result()
            missing = [number for number in worker.share(wanted) if number not in there and number not in writing]
            if missing:
                writing[missing[0]], waits = making.make(missing[0]), False
                continue
            if turns.stop == last and not writing:
                return making.stats
            if not waits and not writing:
                waits = True
                say(f"{cache}: shards of turns {turns.start:,} to {turns.stop - 1:,} are there; waiting for a reader")
            time.sleep(POLL_SECONDS)


def _finished(cache: Path) -> set[int]:
    return set(finished_shards(path.name for path in (cache / "shards").iterdir()))


def _remove(cache: Path, numbers: set[int]) -> None:
    for number in numbers:
        path = cache / shard_name(number)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(path, "remove", error) from error
