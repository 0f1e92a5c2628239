"""The on-disk format of a DFlash feature cache and its reader. Light: no transformers, no datasets, no target.

from cache_format import FeatureCache
batch = FeatureCache.open("/data/cache").batch([0, 1])
"""

from cache_format.batch import DFlashTargetBatch, collate
from cache_format.errors import CacheError, DFlashCacheError, InputError, MismatchError, StorageError
from cache_format.layout.manifest import Manifest
from cache_format.reading.feature_cache import FeatureCache

__all__ = [
    "CacheError",
    "DFlashCacheError",
    "DFlashTargetBatch",
    "FeatureCache",
    "InputError",
    "Manifest",
    "MismatchError",
    "StorageError",
    "collate",
]
