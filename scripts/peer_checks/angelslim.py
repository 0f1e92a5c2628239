"""AngelSlim."""

from __future__ import annotations

from pathlib import Path

from cache_format import FeatureCache
from peer_checks.common import exported, same_records


def angelslim(work: Path) -> None:
    """Records of its offline dataset."""
    from angelslim.compressor.speculative.train.data.dataset_builder.offline_dataset_builder import OfflineEagle3Dataset

    from cache_format.adapters.angelslim import dataset

    same_records(
        "AngelSlim", dataset(FeatureCache.open(work / "cache")), OfflineEagle3Dataset(str(exported(work, "angelslim")))
    )
