"""A cache as a torch dataset of another project's records: what its own DataLoader, sampler and collator take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.data import Dataset

from cache_format.batch import DFlashTargetBatch
from cache_format.reading.feature_cache import FeatureCache


class Records(Dataset):
    """A record for each sample. Pickles to DataLoader workers, as the cache does, if ``record`` does."""

    def __init__(self, cache: FeatureCache, record: Callable[[FeatureCache, DFlashTargetBatch], dict[str, Any]]):
        """``record``: makes one of a sample as ``cache[i]`` gives it."""
        self.cache, self._record = cache, record

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self._record(self.cache, self.cache[i])
