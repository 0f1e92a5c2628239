"""What ``extract --json`` and ``verify --json`` printed, kept by the user and handed to the report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cache_format.errors import InputError

MOST_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What a verification said."""

    cache: str
    depth: str
    """``quick`` or ``full``"""
    whole: bool
    shards: int
    """that were checked"""
    of_shards: int
    """that the cache has"""
    samples: int
    problems: list[str]
    """the first 20"""
    num_problems: int
    now: bool
    """made for this report; False: handed to it, and the cache may have changed since"""


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What an extraction said of itself, times in seconds; of that run alone."""

    tokens: int
    padded_tokens: int
    seconds: float
    seconds_waiting_for_disk: float
    seconds_writing: float
    seconds_to_first_batch: float


@dataclass(frozen=True, kw_only=True)
class Given:
    """All that was handed over."""

    verified: Verified | None = None
    runs: list[Ran] = field(default_factory=list)


def read_given(paths: Sequence[Path], fingerprint: str) -> Given:
    """Read files that ``--with`` names; of several verifications the last counts.

    Raises:
        InputError: a file that is none of the two, or of another cache.
    """
    verified, runs = None, []
    for path in paths:
        content = _content(path)
        if {"run", "fingerprint"} <= set(content):
            if content["fingerprint"] != fingerprint:
                raise InputError(f"--with {path}: is of another cache: its fingerprint is not this one's")
            runs.append(_built(path, lambda run=content["run"]: Ran(**{n: run[n] for n in Ran.__dataclass_fields__})))
        elif {"depth", "problems", "whole"} <= set(content):
            verified = _built(path, lambda content=content: _verified(content))
        else:
            raise InputError(f"--with {path}: is not what `extract --json` or `verify --json` prints")
    return Given(verified=verified, runs=runs)


def _content(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            text = file.read(MOST_BYTES + 1)
        content = json.loads(text) if len(text) <= MOST_BYTES else None
    except OSError as error:
        raise InputError(f"--with {path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise InputError(f"--with {path}: is not what `extract --json` or `verify --json` prints")
    return content


def _built(path: Path, build: Any) -> Any:
    try:
        built = build()
        numbers = [v for k, v in vars(built).items() if k not in ("cache", "depth", "problems")]
        if not all(isinstance(number, int | float) for number in numbers):
            raise ValueError("numbers are wanted")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"--with {path}: is not what `extract --json` or `verify --json` prints: {error}") from None
    return built


def _verified(content: dict[str, Any]) -> Verified:
    problems = [f"{one['file']}: {one['problem']}" for one in content["problems"]]
    return Verified(
        cache=str(content["cache"]),
        depth=str(content["depth"]),
        whole=bool(content["whole"]),
        shards=content["shards"],
        of_shards=content.get("of_shards", content["shards"]),
        samples=content["samples"],
        problems=problems[:20],
        num_problems=len(problems),
        now=False,
    )
