"""Commands as processes, forked from one that has the heavy imports done: real ones, without seconds of start-up."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

PRELOADED = [
    *("extractor.cli.app", "extractor.engine.local", "extractor.job.job", "extractor.target.recompute"),
    *("cache_format.export", "cache_format.upkeep.repair", "cache_format.upkeep.recode_to_store"),
    "transformers.models.qwen3.modeling_qwen3",
]
_MARK = "DFLASH_TEST_COMMAND"
_running: set[Command] = set()


@cache
def outputs() -> tempfile.TemporaryDirectory[str]:
    """What commands print is kept there; made when it is first used, for the commands import this module too."""
    return tempfile.TemporaryDirectory(prefix="dflash-cache-tests-")


class Command:
    """A running ``dflash-cache``; used like ``subprocess.Popen``, its output in files."""

    def __init__(
        self,
        arguments: Sequence[object],
        environment: dict[str, str] | None = None,
        before: Callable[[], None] | None = None,
    ):
        """``before``: a function of a test module, called in the process before the command."""
        self._folder = Path(tempfile.mkdtemp(prefix="command-", dir=outputs().name))
        self.stdout, self.stderr = self._folder / "stdout", self._folder / "stderr"
        self.stdout.touch()
        self.stderr.touch()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        everything = {**os.environ, **(environment or {}), _MARK: str(self._folder)}
        work = ([str(a) for a in arguments], everything, os.getcwd(), self._folder, before)
        self._process = context.Process(target=_run, args=work)
        self._process.start()
        self.pid = self._process.pid
        self.args = ["dflash-cache", *work[0]]
        _running.add(self)

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float = 120) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout, self.stdout.read_text(), self.stderr.read_text())
        _running.discard(self)
        return self._process.exitcode

    def communicate(self, timeout: float = 120) -> tuple[str, str]:
        """Wait for its end; what it wrote to stdout and stderr."""
        self.wait(timeout)
        return self.stdout.read_text(), self.stderr.read_text()

    def send_signal(self, number: int) -> None:
        if self._process.exitcode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def descendants(self) -> list[int]:
        """Processes that it started with ``exec``, or they, and that are still there."""
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                if f"{_MARK}={self._folder}".encode() in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
        return found


def start(*arguments: object, before: Callable[[], None] | None = None, **environment: str) -> Command:
    """``start("extract", *job, "--out", out)``; keywords are environment variables."""
    return Command(arguments, environment, before)


def run(*arguments: object, before: Callable[[], None] | None = None, **environment: str) -> tuple[int, str, str]:
    """As :func:`start`, and wait: exit code, stdout, stderr."""
    command = start(*arguments, before=before, **environment)
    out, errors = command.communicate(timeout=240)
    assert command.returncode is not None
    return command.returncode, out, errors


def made(*arguments: object, **environment: str) -> None:
    """As :func:`run`, for a command that has to succeed."""
    code, out, errors = run(*arguments, **environment)
    assert code == 0, out + errors


def workers_by_fork() -> None:
    """For ``before``: the processes that a command starts are forked, with the imports, and not started anew."""
    import extractor.data.process_pool
    import extractor.engine.local

    forking = multiprocessing.get_context("fork")
    forking.get_context = lambda _method: forking  # type: ignore[method-assign, assignment]
    extractor.engine.local.multiprocessing = forking  # type: ignore[assignment]
    extractor.data.process_pool.multiprocessing = forking  # type: ignore[assignment]


def ready_processes() -> Any:
    """In place of the module ``multiprocessing``: every process comes from the one with the imports done."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return SimpleNamespace(get_context=lambda _method: context, parent_process=multiprocessing.parent_process)


def wait_for(condition, seconds: float = 60):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


@atexit.register
def _kill_what_runs() -> None:
    for command in list(_running):
        command.kill()


# -- in the process ---------------------------------------------------------------------------------------------------


def _run(
    arguments: list[str], environment: dict[str, str], cwd: str, folder: Path, before: Callable[[], None] | None
) -> None:
    import torch

    from extractor.cli import main

    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, name in ((1, "stdout"), (2, "stderr")):
        descriptor = os.open(folder / name, os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", 1)))
    sys.argv = ["dflash-cache", *arguments]
    if before is not None:
        before()
    main()
