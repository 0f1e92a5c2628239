"""Several devices of one machine: a worker process each, one progress view, the workers' reports added up."""

from __future__ import annotations

import multiprocessing
import os
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from cache_format.device import accelerators
from cache_format.errors import DFlashCacheError, InputError
from extractor.config import ExtractOptions
from extractor.engine.shard_queue import WorkerError
from extractor.job.job import extract
from extractor.job.report import ExtractReport, progress_note
from extractor.job.run_shards import RunStats, added
from extractor.job.worker import Worker
from extractor.terminal.progress import Reporter, say
from extractor.terminal.signals import Stopped, stoppable
from extractor.terminal.voice import Voice, speak, voice

SECONDS_TO_STOP = 8.0
"""How long workers may take to stop before they are killed; any instant is safe."""

_REPORT_EVERY_SECONDS = 0.2


def parse_devices(text: str) -> list[str]:
    """``all`` accelerators of this machine, or a list such as ``cuda:0,cuda:2`` or ``cpu,cpu``.

    Raises:
        InputError: no such devices.
    """
    if text == "all":
        found = accelerators()
        if not found:
            raise InputError("--devices all: this machine has no CUDA device; name some, such as cpu,cpu")
        return list(map(str, found))
    devices = [name.strip() for name in text.split(",")]
    if not all(devices):
        raise InputError(f"--devices {text!r}: write all, or names with commas between, such as cuda:0,cuda:1")
    return devices


def engine_devices(devices: Sequence[str], each: int) -> list[str]:
    """The first device of each worker, where a worker takes ``each`` of them that follow one another.

    Raises:
        InputError: they do not divide so.
    """
    groups = [devices[start : start + each] for start in range(0, len(devices), each)]
    for group in groups:
        numbers = [int(number) for _, colon, number in (name.partition(":") for name in group) if colon]
        if len(group) < each or numbers != list(range(numbers[0], numbers[0] + len(numbers)) if numbers else []):
            raise InputError(
                f"--devices {','.join(devices)}: each engine takes {each} devices that follow one another "
                "(--tensor-parallel times --pipeline-parallel)"
            )
    return [group[0] for group in groups]


def extract_on(devices: Sequence[str], options: ExtractOptions) -> ExtractReport:
    """:func:`extractor.job.job.extract` with a worker process on each of ``devices``.

    Raises:
        DFlashCacheError: as there, of the first worker that failed; the others are stopped.
        WorkerError: a worker was killed. The others finish their shards first.
    """
    context = multiprocessing.get_context("spawn")
    job = f"{os.getpid()} {secrets.token_hex(8)}"
    processes: dict[Connection, BaseProcess] = {}
    for rank, device in enumerate(devices):
        worker = Worker(rank=rank, world_size=len(devices), job=job, local_size=len(devices))
        mine, theirs = context.Pipe(duplex=False)
        arguments = (replace(options, target=replace(options.target, device=device)), worker, voice(), theirs)
        # Not a daemon: those may not have processes of their own, as an engine of vLLM has.
        processes[mine] = context.Process(target=_work, args=arguments, name=f"worker {rank} ({device})")
        processes[mine].start()
        theirs.close()
    try:
        return _follow(processes)
    finally:
        _stop(list(processes.values()))


def _follow(processes: dict[Connection, BaseProcess]) -> ExtractReport:
    running, stats = dict(processes), {pipe: RunStats() for pipe in processes}
    leader, begun = next(iter(processes)), set[Connection]()
    shares: dict[Connection, int] = {}
    todo, dead, last = 0, [], None
    with Reporter("extract", None, "tokens") as reporter:
        while running:
            for pipe in wait(list(running)):
                assert isinstance(pipe, Connection)
                try:
                    what, value = pipe.recv()
                except EOFError:
                    process = running.pop(pipe)
                    process.join()
                    if process.exitcode:
                        dead.append(process)
                        if pipe is leader and begun < set(running):
                            # The others would wait for what it was to prepare.
                            raise _died(dead) from None
                    continue
                if what == "error":
                    raise value
                if what == "said":
                    say(value)
                elif what == "todo":
                    begun.add(pipe)
                    todo, shares[pipe] = todo + value, value
                    reporter.total = todo
                elif what == "stats":
                    stats[pipe] = value
                    reporter.worker(processes[pipe].name, value.tokens, shares.get(pipe), progress_note(value))
                    total = added(stats.values())
                    reporter.update(total.tokens, progress_note(total))
                else:
                    last, stats[pipe] = value, value.run
    if dead:
        raise _died(dead)
    assert last is not None
    return replace(last, run=added(stats.values()))


def _died(processes: list[BaseProcess]) -> WorkerError:
    names = ", ".join(f"{process.name} (exit code {process.exitcode})" for process in processes)
    return WorkerError(f"died: {names}; run the same command again, it makes the shards that are missing")


def _stop(processes: list[BaseProcess]) -> None:
    for process in processes:
        if process.is_alive():
            process.terminate()
    deadline = time.monotonic() + SECONDS_TO_STOP
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()


def _work(options: ExtractOptions, worker: Worker, told: Voice, pipe: Connection) -> None:
    """A worker process: one extraction's share, its progress and its end sent through ``pipe``."""
    sending = threading.Lock()

    def send(what: str, value: object) -> None:
        with sending:
            pipe.send((what, value))

    speak(told, lambda text: send("said", text))
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    sent = 0.0

    def report(stats: RunStats) -> None:
        nonlocal sent
        if time.monotonic() - sent > _REPORT_EVERY_SECONDS:
            sent = time.monotonic()
            send("stats", stats)

    try:
        with stoppable(f"worker {worker.rank} left"):
            done = extract(options, worker, on_todo=lambda tokens: send("todo", tokens), on_stats=report)
            send("done", done)
    except Stopped as stop:
        os._exit(stop.exit_code)
    except DFlashCacheError as error:
        say(f"worker {worker.rank}: stopped by an error")
        send("error", error)


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
