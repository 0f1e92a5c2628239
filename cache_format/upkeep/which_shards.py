"""Which shards a verification looks at: all of them, ranges of them, or a random share that anybody can draw again."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import xxhash

from cache_format.errors import InputError

_RANGES = re.compile(r"\d{1,15}(-\d{1,15})?(,\d{1,15}(-\d{1,15})?)*", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class WhichShards:
    """A choice of shards, made without looking at them. By default all.

    A share is drawn by rank: the shards with the smallest XXH3 of the text ``seed:number``. So it does not depend on
    the version of any random generator, and with the same seed a larger share holds every smaller one.
    """

    share: float = 1.0
    """of the shards in ``ranges``, above 0 and at most 1; rounded up to whole shards"""
    seed: int = 0
    """of the drawing; of no account where ``share`` is 1"""
    ranges: tuple[tuple[int, int], ...] = ()
    """first and last shard of each range, ascending and apart; empty: all"""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise InputError(f"--sample {self.share}: must be above 0 and at most 1, such as 0.01")
        if self.seed < 0:
            raise InputError(f"--seed {self.seed}: must not be negative")
        bounds = [-1, *(bound for one in self.ranges for bound in (one[0], one[1]))]
        if any(low > high for low, high in self.ranges) or any(
            a >= b for a, b in zip(bounds[::2], bounds[1::2], strict=False)
        ):
            raise ValueError(f"ranges {self.ranges} are not ascending and apart")

    @property
    def all(self) -> bool:
        """Whether nothing is left out."""
        return self.share == 1 and not self.ranges

    def require_within(self, num_shards: int) -> None:
        """Whether a cache of so many shards has them all.

        Raises:
            InputError: a range goes beyond the cache.
        """
        if self.ranges and self.ranges[-1][1] >= num_shards:
            have = f"has shards 0-{num_shards - 1}" if num_shards else "has no shard"
            raise InputError(f"--shards {format_ranges(self.ranges)}: this cache {have}")

    def of(self, num_shards: int) -> list[int]:
        """Their numbers in ascending order, in a cache of so many shards."""
        ranges = self.ranges or ((0, num_shards - 1),)
        numbers = [n for low, high in ranges for n in range(low, min(high + 1, num_shards))]
        if self.share == 1:
            return numbers
        # Rounded first: 0.07 * 100 is a little more than 7.
        count = math.ceil(round(self.share * len(numbers), 6))
        return sorted(sorted(numbers, key=self._rank)[: max(count, 1)])

    def _rank(self, number: int) -> int:
        return xxhash.xxh3_64_intdigest(f"{self.seed}:{number}".encode())


def parse_ranges(text: str) -> tuple[tuple[int, int], ...]:
    """``0-999,1500`` as ranges, ascending and apart; those that touch or overlap become one.

    Raises:
        InputError: not ranges.
    """
    if not _RANGES.fullmatch(text):
        raise InputError(f"--shards {text!r}: write numbers and ranges with commas between, such as 0-999,1500")
    found: list[tuple[int, int]] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        low, high = int(first), int(last or first)
        if low > high:
            raise InputError(f"--shards {text}: {part} ends before it begins")
        found.append((low, high))
    return _joined(sorted(found))


def as_ranges(numbers: list[int]) -> tuple[tuple[int, int], ...]:
    """Ascending numbers as ranges."""
    return _joined([(number, number) for number in numbers])


def format_ranges(ranges: tuple[tuple[int, int], ...]) -> str:
    """``((0, 999), (1500, 1500))`` -> ``0-999,1500``."""
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in ranges)


def _joined(ranges: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    joined: list[tuple[int, int]] = []
    for low, high in ranges:
        if joined and low <= joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], max(joined[-1][1], high))
        else:
            joined.append((low, high))
    return tuple(joined)
