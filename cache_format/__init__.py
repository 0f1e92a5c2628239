"""The on-disk format of a DFlash feature cache and its reader. Light: no transformers, no datasets, no target.

A first batch:

    from cache_format import FeatureCache

    batch = FeatureCache.open("/data/cache").batch([0, 1])
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cache_format.batch import DFlashTargetBatch
    from cache_format.errors import (
        CacheError,
        DFlashCacheError,
        InputError,
        MismatchError,
        StorageError,
        WriterStoppedError,
    )
    from cache_format.layout.index import Index
    from cache_format.layout.manifest import Manifest
    from cache_format.reading.collate import collate
    from cache_format.reading.feature_cache import FeatureCache
    from cache_format.reading.follow import FollowedCache
    from cache_format.reading.loader import CacheLoader

__version__ = "0.2.0"

__all__ = [
    "CacheError",
    "CacheLoader",
    "DFlashCacheError",
    "DFlashTargetBatch",
    "FeatureCache",
    "FollowedCache",
    "Index",
    "InputError",
    "Manifest",
    "MismatchError",
    "StorageError",
    "WriterStoppedError",
    "collate",
]

_ERRORS = ("CacheError", "DFlashCacheError", "InputError", "MismatchError", "StorageError", "WriterStoppedError")
_HOMES = {
    **dict.fromkeys(_ERRORS, "cache_format.errors"),
    "DFlashTargetBatch": "cache_format.batch",
    "collate": "cache_format.reading.collate",
    "FeatureCache": "cache_format.reading.feature_cache",
    "FollowedCache": "cache_format.reading.follow",
    "Manifest": "cache_format.layout.manifest",
    "Index": "cache_format.layout.index",
    "CacheLoader": "cache_format.reading.loader",
}
"""Public name -> its module, imported when the name is first used: what needs no torch does not wait for it."""


def __getattr__(name: str) -> Any:
    if name in ("batch", "errors"):
        return import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
