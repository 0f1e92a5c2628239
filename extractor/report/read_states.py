"""Read the states of some tokens of samples, several samples at a time where a store makes one wait."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cache_format.codecs import RawCodec, codec_from_dict
from cache_format.errors import CacheError, StorageError
from cache_format.reading.feature_cache import FeatureCache
from cache_format.storage.folder import LocalFolder
from extractor.report.chosen_samples import choose_tokens

MOST_STATE_BYTES = 2 << 30
"""Of states that are read: a report takes seconds to a minute, however wide the states are."""

_SIDE_BY_SIDE = 8


@dataclass(frozen=True, slots=True)
class ReadStates:
    """What was read of a sample."""

    sample_id: int
    shard: int
    places: np.ndarray
    """int64 ``[n]``: of the tokens"""
    rows: Tensor | None
    """``[n, L*H]``; None: it cannot be read"""
    problem: str
    """why"""


def read_states(cache: FeatureCache, chosen: np.ndarray) -> Iterator[ReadStates]:
    """Samples at ``chosen`` (positions in the index), in that order, until 2 GiB are read.

    Of a shard that cannot be read the first sample says so, and the others are passed over.
    """
    damaged: set[int] = set()

    def read(i: int) -> ReadStates | None:
        shard, sample_id = int(cache.index.shard[i]), int(cache.index.sample_id[i])
        places = choose_tokens(int(cache.index.num_tokens[i]))
        if shard in damaged:
            return None
        try:
            return ReadStates(sample_id, shard, places, cache[i].hidden_states[0][torch.from_numpy(places)], "")
        except (CacheError, StorageError) as error:
            damaged.add(shard)
            return ReadStates(sample_id, shard, places, None, str(error))

    wanted = _within_bounds(cache, chosen)
    found = map(read, wanted) if isinstance(cache.folder, LocalFolder) else _side_by_side(read, wanted)
    return (one for one in found if one is not None)


def _within_bounds(cache: FeatureCache, chosen: np.ndarray) -> list[int]:
    """Those of ``chosen`` that 2 GiB have room for, at least one."""
    manifest, lengths = cache.manifest, cache.index.num_tokens[chosen].astype(np.int64)
    if isinstance(codec_from_dict(manifest.codec), RawCodec) and isinstance(cache.folder, LocalFolder):
        # Mapped: only the tokens that are looked at are read.
        lengths = np.asarray([len(choose_tokens(length)) for length in lengths.tolist()], np.int64)
    token_bytes = manifest.width * manifest.torch_dtype.itemsize
    most = int(np.searchsorted(np.cumsum(lengths) * token_bytes, MOST_STATE_BYTES, side="right"))
    return [int(i) for i in chosen[: max(most, 1)]]


def _side_by_side(read: Callable[[int], ReadStates | None], wanted: Iterable[int]) -> Iterator[ReadStates | None]:
    pending: deque[Future[ReadStates | None]] = deque()
    with ThreadPoolExecutor(_SIDE_BY_SIDE, thread_name_prefix="report") as pool:
        for i in wanted:
            pending.append(pool.submit(read, i))
            if len(pending) >= _SIDE_BY_SIDE:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
