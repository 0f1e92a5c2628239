"""Work in several processes whose results come in the order of the tasks; they end with their main process."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from cache_format.errors import DFlashCacheError

Result = TypeVar("Result")


def results(
    work: Callable[..., Result], how: Any, tasks: Iterable[tuple[Any, ...]], processes: int
) -> Generator[Result, None, None]:
    """``work(how, *task)`` of each task, in order: in this process, or in so many others, which take ``how`` once.

    Tasks are taken from ``tasks`` as processes become free. Close the generator to stop the processes.

    Raises:
        DFlashCacheError: a process died, or what ``work`` raises.
    """
    if processes <= 1:
        for task in tasks:
            yield work(how, *task)
        return
    pool = ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), initializer=_start, initargs=(work, how)
    )
    pending: deque[Future[Result]] = deque()
    try:
        for task in tasks:
            if len(pending) > processes:
                yield pending.popleft().result()
            with _interrupts_held():
                pending.append(pool.submit(_do, task))
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise DFlashCacheError(
            "a preparing process ended unexpectedly (out of memory?); run the same command again, "
            "finished parts are kept"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Processes started meanwhile never see Ctrl-C (the mask is inherited): the main process alone acts on it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# -- in one of the processes ------------------------------------------------------------------------------------------

_work: Callable[..., Any]
_how: Any


def _start(work: Callable[..., Any], how: Any) -> None:
    """Keep what every task needs, and end with the main process even where that is killed."""
    global _work, _how
    _work, _how = work, how
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _do(task: tuple[Any, ...]) -> Any:
    return _work(_how, *task)
