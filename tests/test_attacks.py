"""Every file of tests/attacks makes a cache hostile. Nothing that reads it may crash, hang, grow or leave the cache."""

from __future__ import annotations

import importlib.util
import os
import resource
import shutil
import sys
import time
from pathlib import Path

import fuzz
import pytest
from synthetic import write_cache

from cache_format import DFlashCacheError
from cache_format.upkeep.verify import verify
from extractor.job.inspect import summarise

ATTACKS = Path(__file__).parent / "attacks"
sys.path.insert(0, str(ATTACKS))
NAMES = sorted(path.stem for path in ATTACKS.glob("*.py") if path.stem != "edit")
SECONDS = 20


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("attacks") / "cache"
    write_cache(path, [5, 40, 3, 17, 29, 8, 61, 12], hidden=256)
    return path


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"attack_{name}", ATTACKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def in_child(cache: Path) -> str:
    """What reading comes to, in a process of its own with little memory and time: ``read``, or what was raised."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + fuzz.MEMORY_LIMIT, resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        result = "read"
        try:
            fuzz.exercise(cache)
            result = "read" if verify(cache, threads=2).whole else "read and found by verify"
        except BaseException as error:
            result = f"{'refused' if isinstance(error, DFlashCacheError) else 'CRASH'} {type(error).__name__}: {error}"
        try:
            summarise(cache)
        except DFlashCacheError:
            pass
        except BaseException as error:
            result = f"CRASH of inspect: {type(error).__name__}: {error}"
        os.write(writing, result.encode()[:4000])
        os._exit(0)
    os.close(writing)
    # Of the clock, for what sleeps; a busy machine is no attack, so seconds of work are limited in the child.
    deadline = time.monotonic() + 3 * SECONDS
    while os.waitpid(pid, os.WNOHANG)[0] == 0:
        if time.monotonic() > deadline:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
            return "CRASH: it hangs"
        time.sleep(0.005)
    with os.fdopen(reading, "rb") as pipe:
        return pipe.read().decode() or "CRASH of the interpreter"


@pytest.mark.parametrize("name", NAMES)
def test_an_attack_is_refused(name, good, tmp_path):
    cache = Path(shutil.copytree(good, tmp_path / "cache"))
    (tmp_path / "outside").mkdir()
    load(name).attack(cache)
    outside = sorted(tmp_path.joinpath("outside").rglob("*"))
    result = in_child(cache)
    assert result.startswith("refused") or result == "read and found by verify", result
    assert str(cache) in result or result.startswith("read"), "the message names the file"
    assert sorted(tmp_path.joinpath("outside").rglob("*")) == outside


def test_the_cache_before_the_attacks_is_read(good):
    assert in_child(good) == "read"
