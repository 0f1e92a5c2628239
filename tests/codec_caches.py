"""What the tests of caches with codecs share."""

from __future__ import annotations

import torch

from cache_format.codecs import CODECS

LENGTHS = [5, 7, 120, 12, 40, 1] * 8


def close(codec: str, original: torch.Tensor, read: torch.Tensor) -> bool:
    if CODECS[codec].lossless:
        return torch.equal(original, read)
    # At 30 dB, the least that a codec keeps: 0.032.
    return bool((read - original).float().square().mean().sqrt() < 0.05 * original.float().square().mean().sqrt())
