"""How many tokens have which SNR, by layer: a sum over tokens says little, since a few hold most of the energy."""

from __future__ import annotations

import numpy as np
from torch import Tensor

TOKEN_SNR = "hidden_states_token_snr"
"""I32 ``[L, BINS]`` in the head of a shard of a lossy codec: bin b counts the tokens of b to b + 1 dB; the first one
those below as well, the last one those above, and those that are exact."""

BINS = 64
_EDGES = np.array([10.0 ** (b / 10) for b in range(1, BINS)])


def token_snr(by_token: Tensor) -> np.ndarray:
    """int32 ``[L, BINS]`` of float64 ``[n, 2, L]`` on the host: each token's energy and that of its error, by layer.

    Ratios are compared with the bins' edges, so that no logarithm's last bit decides.
    """
    energy, error = by_token.numpy()[:, 0], by_token.numpy()[:, 1]
    ratio = np.divide(energy, error, out=np.full(energy.shape, np.inf), where=error > 0)
    bins = np.searchsorted(_EDGES, ratio, side="right")
    return np.stack([np.bincount(of_layer, minlength=BINS) for of_layer in bins.T]).astype(np.int32)


def median_db(counts: np.ndarray) -> float:
    """The middle of the bin in which the median of the tokens ``[BINS]`` is; within half a dB."""
    return float(np.searchsorted(np.cumsum(counts), counts.sum() / 2)) + 0.5


def worst_db(counts: np.ndarray) -> float:
    """What every token of ``[BINS]`` reaches; 0.0: the worst may be below."""
    return float(np.argmax(counts > 0))
