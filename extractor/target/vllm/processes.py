"""vLLM's processes: no name by which they met may stay, however they end, and what they say of an error is a line."""

from __future__ import annotations

import glob
import logging
import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import util
from pathlib import Path
from typing import Any

SHARED_MEMORY = "/dev/shm"
_FILE = "file://"


@contextmanager
def meeting_place() -> Iterator[str]:
    """A folder for the sockets of an engine that starts. They are gone once all have met, and go on without names.

    In shared memory: a socket's path has at most 107 characters, and a file system of a network may have none.
    """
    with tempfile.TemporaryDirectory(prefix="dflash-cache-", dir=SHARED_MEMORY) as folder:
        yield folder


@contextmanager
def apart_from_the_terminal() -> Iterator[None]:
    """Processes that are started here do not get Ctrl-C, which goes to all of a terminal: the job does, and ends them.

    Python would tell of it in the midst of their imports, with a traceback.
    """
    spawn = util.spawnv_passfds

    def spawned(path: Any, args: Any, passfds: Any) -> int:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return spawn(path, args, passfds)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    util.spawnv_passfds = spawned
    try:
        yield
    finally:
        util.spawnv_passfds = spawn


def forget_shared_memory(meeting: str) -> None:
    """In a worker, once all have met: of what vLLM's kernels for CPUs share by name, which it leaves after a good end.

    Args:
        meeting: ``distributed_init_method`` of the workers; what they share is named after it.
    """
    if meeting.startswith(_FILE):
        for path in Path(SHARED_MEMORY).glob(f"{glob.escape(Path(meeting).name)}-*"):
            path.unlink(missing_ok=True)


def forget_meeting(meeting: str) -> None:
    """Once the workers have ended: the file they met by, which a killed one leaves."""
    if meeting.startswith(_FILE):
        Path(meeting.removeprefix(_FILE)).unlink(missing_ok=True)


class _LastLine(logging.Filter):
    """In place of a traceback what it ends with."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep every record."""
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            record.msg, record.args = f"{record.getMessage()} {type(error).__name__}: {error}", None
            record.exc_info = record.exc_text = None
        return True


def speak_in_lines() -> None:
    """In this process vLLM tells of errors without a traceback, unless VLLM_LOGGING_LEVEL asks for more than errors."""
    if os.environ.get("VLLM_LOGGING_LEVEL") == "ERROR":
        for handler in logging.getLogger("vllm").handlers:
            handler.addFilter(_LastLine())
