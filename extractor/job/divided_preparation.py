"""How the workers of a job prepare the samples together: see ``data/division.py`` for who makes what.

The leading worker begins the cache, makes its share and whatever is missing then, and plans the shards. Another one
makes its share once the cache is begun, and waits for the plan.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from cache_format.errors import InputError, StorageError
from cache_format.layout.manifest import Manifest
from extractor.data.division import Division
from extractor.job.destination import Destination
from extractor.job.worker import Worker

PATIENCE_SECONDS = 30 * 60.0
"""How long a worker waits for the plan without seeing a part of the prepared samples made."""

SECONDS_TO_HEAR = 5.0
"""From the end of the leading worker to that of the others: whoever started them hears of the cause first."""


def division_of(worker: Worker, destination: Destination) -> Division:
    """``worker``'s part in preparing."""
    return Division(
        rank=worker.rank,
        world_size=worker.world_size,
        local_size=worker.local_size,
        wanted=lambda: worker.leads or _is_preparing(destination.manifest()),
        bring=destination.bring_part,
        made=destination.part_made,
    )


def await_plan(destination: Destination, rank: int, prepare_share: Callable[[Manifest], None]) -> None:
    """Of a worker that does not lead: until the samples are prepared and the shards planned, help with the former.

    Raises:
        InputError: the leading worker has given up, or nobody has made anything for half an hour.
    """
    helped, seen, since = False, 0, time.monotonic()
    while (manifest := destination.manifest()) is None or manifest.state == "preparing":
        if manifest is None and helped:
            _refuse_end(destination, rank)
        if manifest is not None and not helped:
            helped = True
            _help(destination, manifest, prepare_share)
            since = time.monotonic()
            continue
        made = destination.parts_seen()
        if made != seen:
            seen, since = made, time.monotonic()
        if time.monotonic() - since > PATIENCE_SECONDS:
            raise InputError(
                f"{destination.where}: worker {rank} has waited {PATIENCE_SECONDS / 60:.0f} minutes for "
                "worker 0 to prepare the samples and has not seen it make any; look at its output, then start all "
                "again. Where preparing takes long, run the command with one worker first, and stop it once "
                "shards are made"
            )
        time.sleep(destination.poll_seconds)


def help_prepare(destination: Destination, prepare_share: Callable[[Manifest], None]) -> None:
    """Help a worker that leads elsewhere, if it prepares; what it has not made by then, that one makes."""
    manifest = destination.manifest()
    if _is_preparing(manifest):
        assert manifest is not None
        _help(destination, manifest, prepare_share)


def _help(destination: Destination, manifest: Manifest, prepare_share: Callable[[Manifest], None]) -> None:
    try:
        prepare_share(manifest)
    except StorageError:
        # The leading worker takes the folder away when it gives up.
        if destination.manifest() is not None:
            raise


def _refuse_end(destination: Destination, rank: int) -> None:
    deadline = time.monotonic() + SECONDS_TO_HEAR
    while time.monotonic() < deadline:
        time.sleep(destination.poll_seconds)
        if destination.manifest() is not None:
            return
    raise InputError(
        f"{destination.where}: worker {rank} stops, since worker 0 could not prepare the samples; its output says why"
    )


def _is_preparing(manifest: Manifest | None) -> bool:
    return manifest is not None and manifest.state == "preparing"
