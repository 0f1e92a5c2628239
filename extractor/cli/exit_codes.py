"""What the exit code of a command says; see app.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cache_format.errors import CacheError, InputError, StorageError

EXIT_FAILED, EXIT_COULD_NOT_START = 1, 2


@contextmanager
def or_could_not_run() -> Iterator[None]:
    """Exit code 2 where a cache cannot be looked at, so that 1 means that it was looked at and is damaged."""
    try:
        yield
    except (CacheError, StorageError) as error:
        raise InputError(str(error)) from error
    except OSError as error:
        raise InputError(str(StorageError(error.filename or "the cache", "read", error))) from error
