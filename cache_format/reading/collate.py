"""Samples -> one padded batch, where a torch ``DataLoader`` makes them; samples of unlike caches are refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cache_format.batch import DFlashTargetBatch
from cache_format.errors import InputError

_CACHE = "dflash_cache"


def collate(samples: Sequence[DFlashTargetBatch]) -> DFlashTargetBatch:
    """One batch of several, right-padded with zeros to the longest: the ``collate_fn`` of a torch ``DataLoader``.

    Args:
        samples: unpacked, as ``cache[i]`` gives them.

    Raises:
        InputError: two of them differ in what they hold, or in its dtype or width: they are of caches that do not go
            together. Names both caches.
    """
    first = samples[0]
    for name in (field.name for field in fields(DFlashTargetBatch)):
        for sample in samples:
            one, other = (_described(getattr(s, name)) for s in (first, sample))
            if one != other:
                raise InputError(
                    f"collate: {name} is {one} in a sample of {_cache_of(first)}, and {other} in one of "
                    f"{_cache_of(sample)}; batch samples of caches that were made alike"
                )

    def padded(name: str) -> Tensor | None:
        values = [getattr(sample, name) for sample in samples]
        return None if values[0] is None else pad_sequence([row for value in values for row in value], True)

    return DFlashTargetBatch(*(padded(field.name) for field in fields(DFlashTargetBatch)))  # type: ignore[arg-type]


def _described(tensor: Tensor | None) -> str:
    """What has to be the same in all samples of a batch."""
    if tensor is None:
        return "absent"
    return f"{str(tensor.dtype).removeprefix('torch.')} [{', '.join(['B', 'S', *map(str, tensor.shape[2:])])}]"


def mark(sample: DFlashTargetBatch, cache: str) -> DFlashTargetBatch:
    """``sample``, which now knows the path or URL of its cache, for :func:`collate`'s messages."""
    vars(sample.hidden_states)[_CACHE] = cache
    return sample


def _cache_of(sample: DFlashTargetBatch) -> str:
    return str(vars(sample.hidden_states).get(_CACHE, "no cache known"))
