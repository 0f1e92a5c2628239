"""What verify finds: one thing that is wrong with a cache, and where."""

from __future__ import annotations

from dataclasses import dataclass

from cache_format.errors import CacheError, StorageError


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong."""

    file: str
    """path below the cache"""
    problem: str
    shard: int | None = None
    sample: int | None = None
    """sample_id"""
    field: str | None = None
    """tensor, column or manifest field"""

    def __str__(self) -> str:
        places = [("shard", self.shard), ("sample", self.sample), ("field", self.field)]
        where = ", ".join(f"{name} {value}" for name, value in places if value is not None)
        return f"{self.file}{f' ({where})' if where else ''}: {self.problem}"


def told(error: CacheError | StorageError) -> str:
    """The error without its path. What the system will not give (a bad sector, no permission) is a problem as well."""
    return str(error).removeprefix(f"{error.path}: ")
