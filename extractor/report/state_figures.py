"""What hidden states are like, layer by layer: pure functions of states; nothing is read here.

A target's first token is told apart everywhere: trained LLMs give it norms tens or hundreds of times the others', and
a mean over all tokens would say only that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
NEAR_CONSTANT = 0.01
"""A channel is near-constant where its standard deviation is below this share of its root mean square."""

TOP_CHANNELS = 5
CURVE_POINTS = 48
GROWTH_TOKENS = 16
"""A sample with fewer tokens looked at says nothing of growth."""


@dataclass(frozen=True, slots=True)
class SampleStates:
    """Some tokens of a sample."""

    sample_id: int
    positions: np.ndarray
    """int64 ``[n]``, ascending: places of the tokens in the sample"""
    states: Tensor
    """``[n, L, H]``, any floating dtype"""


@dataclass(frozen=True, kw_only=True)
class Channel:
    """A feature of a layer that stands out."""

    channel: int
    size: float
    """root mean square over the tokens"""
    times: float
    """that over the median of all channels"""
    share: float
    """of the layer's energy (sum of squares)"""


@dataclass(frozen=True, kw_only=True)
class Growth:
    """How much larger the norms at a sample's end are than at its beginning."""

    times: float
    """median norm of the last quarter of the tokens looked at over that of the first quarter, first token left out"""
    sample_id: int
    """the sample in which it is largest"""


@dataclass(frozen=True, kw_only=True)
class LayerFigures:
    """One layer; all but ``first_*`` leave the first token of each sample out."""

    layer: int
    norms: list[float]
    """Euclidean norms of tokens: quantiles 0.05, 0.25, 0.5, 0.75, 0.95"""
    first_norm: float
    """median norm of first tokens"""
    first_channels: list[Channel]
    """that carry most of the first tokens' energy"""
    top_channels: list[Channel]
    """the largest, by root mean square"""
    channel_sizes: list[float]
    """root mean square of channels, largest first, at the ranks of ``StateFigures.ranks``"""
    near_constant: float
    """share of channels whose standard deviation is below 1 % of their root mean square"""
    constant: bool
    """every token has the same states"""
    largest: float
    """absolute value, first tokens included"""
    zero_tokens: int
    """whose states are all 0, first tokens included"""
    nonfinite_tokens: int
    """with NaN or Inf, first tokens included; the other figures leave these tokens out"""
    growth: Growth | None
    """None where no sample is long enough"""


@dataclass(frozen=True, kw_only=True)
class PositionNorms:
    """Norms of tokens by their place in the sample, in ranges that double: 0, 1, 2-3, 4-7, ..."""

    starts: list[int]
    """first place of each range"""
    medians: list[list[float]]
    """``[L][ranges]``"""
    low: list[list[float]]
    """5 % of the tokens are below"""
    high: list[list[float]]
    """5 % are above"""


@dataclass(frozen=True, kw_only=True)
class StateFigures:
    """All of it."""

    samples: int
    tokens: int
    layers: list[LayerFigures]
    positions: PositionNorms
    ranks: list[int]
    """of ``channel_sizes``, from 1"""
    similarity: list[list[float | None]]
    """``[L][L]``: cosine of two layers' states over all tokens, the mean of each channel taken away first; None where
    a layer is constant"""
    identical: list[tuple[int, int]]
    """pairs of layer ids whose states are the same to the bit"""


class Summing:
    """States as they come, summed up: memory does not grow with their width times their number."""

    def __init__(self, layer_ids: list[int], hidden_size: int):
        shape, count = (len(layer_ids), hidden_size), len(layer_ids)
        self.layer_ids = layer_ids
        self.samples = 0
        self._tokens, self._firsts = np.zeros(count), np.zeros(count)
        self._sum, self._squares, self._first_squares = (np.zeros(shape) for _ in range(3))
        self._products = np.zeros((count, count))
        self._one: Tensor | None = None
        self._constant = np.ones(count, bool)
        self._pairs = set(combinations(range(count), 2))
        self._norms: list[np.ndarray] = []
        self._places: list[np.ndarray] = []
        self._growth: list[Growth | None] = [None] * count
        self._largest, self._zeros, self._bad = np.zeros(count), np.zeros(count, int), np.zeros(count, int)

    def add(self, sample: SampleStates) -> None:
        """Count one sample in."""
        stored, states = sample.states, sample.states.float()
        finite = torch.isfinite(states).all(dim=2)
        states = torch.where(finite[..., None], states, 0.0)
        norms = torch.linalg.vector_norm(states, dim=2).double()
        self._bad += (~finite).sum(0).numpy()
        self._zeros += ((norms == 0) & finite).sum(0).numpy()
        self._largest = np.maximum(self._largest, states.abs().amax((0, 2)).double().numpy())
        self._pairs = {(a, b) for a, b in self._pairs if torch.equal(stored[:, a], stored[:, b])}
        known = torch.where(finite, norms, torch.nan).numpy()
        self._norms.append(known.astype(np.float32))
        self._places.append(sample.positions)
        first = sample.positions == 0
        self._add_sums(states[~torch.from_numpy(first)], finite[~torch.from_numpy(first)])
        for row in states[torch.from_numpy(first)]:
            self._first_squares += row.double().square().numpy()
        self._firsts += finite[torch.from_numpy(first)].sum(0).numpy()
        self._add_growth(sample.sample_id, known[~first])
        self.samples += 1

    def _add_sums(self, states: Tensor, finite: Tensor) -> None:
        """Of ``[n, L, H]`` without first tokens, non-finite rows zero."""
        if len(states):
            self._one = states[0].clone() if self._one is None else self._one
            self._constant &= (states == self._one).all(2).all(0).numpy()
        self._tokens += finite.sum(0).numpy()
        self._sum += states.sum(0, dtype=torch.float64).numpy()
        self._squares += states.double().square().sum(0).numpy()
        by_layer = states.transpose(0, 1).flatten(1)
        self._products += (by_layer @ by_layer.T).double().numpy()

    def _add_growth(self, sample_id: int, norms: np.ndarray) -> None:
        quarter = len(norms) // 4
        if len(norms) < GROWTH_TOKENS:
            return
        for layer, (begin, end) in enumerate(zip(norms[:quarter].T, norms[-quarter:].T, strict=True)):
            low, high = np.median(begin), np.median(end)
            before = self._growth[layer]
            if low > 0 and np.isfinite(high) and (before is None or high / low > before.times):
                self._growth[layer] = Growth(times=float(high / low), sample_id=sample_id)

    def figures(self) -> StateFigures:
        """What all samples so far give.

        Raises:
            ValueError: there was none.
        """
        if not self.samples:
            raise ValueError("no states were added")
        norms, places = np.concatenate(self._norms), np.concatenate(self._places)
        hidden = self._sum.shape[1]
        ranks = np.unique(np.geomspace(1, hidden, CURVE_POINTS).round().astype(int))
        return StateFigures(
            samples=self.samples,
            tokens=len(places),
            layers=[self._layer(layer, norms[:, layer], places, ranks) for layer in range(len(self.layer_ids))],
            positions=position_norms(norms, places),
            ranks=ranks.tolist(),
            similarity=self._similarity(),
            identical=sorted((self.layer_ids[a], self.layer_ids[b]) for a, b in self._pairs),
        )

    def _layer(self, layer: int, norms: np.ndarray, places: np.ndarray, ranks: np.ndarray) -> LayerFigures:
        tokens = max(self._tokens[layer], 1)
        squares = self._squares[layer] / tokens
        deviation = np.sqrt(np.maximum(squares - (self._sum[layer] / tokens) ** 2, 0))
        sizes = np.sqrt(squares)
        near = deviation <= NEAR_CONSTANT * sizes
        first_sizes = np.sqrt(self._first_squares[layer] / max(self._firsts[layer], 1))
        return LayerFigures(
            layer=self.layer_ids[layer],
            norms=_quantiles(norms[places > 0], QUANTILES),
            first_norm=_quantiles(norms[places == 0], (0.5,))[0],
            first_channels=_largest_channels(first_sizes, 3),
            top_channels=_largest_channels(sizes, TOP_CHANNELS),
            channel_sizes=np.sort(sizes)[::-1][ranks - 1].tolist(),
            near_constant=float(near.mean()) if tokens > 1 else 0.0,
            constant=bool(tokens > 1 and self._constant[layer]),
            largest=float(self._largest[layer]),
            zero_tokens=int(self._zeros[layer]),
            nonfinite_tokens=int(self._bad[layer]),
            growth=self._growth[layer],
        )

    def _similarity(self) -> list[list[float | None]]:
        tokens = np.maximum(self._tokens, 1)
        means = self._sum / tokens[:, None]
        centred = self._products / np.sqrt(np.outer(tokens, tokens)) - means @ means.T
        energy, varies = np.diag(self._products) / tokens, np.diag(centred).copy()
        # Sums in float32 cancel to about this where nothing varies.
        varies[varies <= 1e-5 * energy] = np.nan
        cosines = np.clip(centred / np.sqrt(np.outer(varies, varies)), -1, 1)
        return [[None if np.isnan(c) else float(c) for c in row] for row in cosines]


def state_figures(samples: Iterable[SampleStates], layer_ids: list[int]) -> StateFigures:
    """What ``samples`` are like.

    Raises:
        ValueError: there is none.
    """
    summing: Summing | None = None
    for sample in samples:
        summing = summing or Summing(layer_ids, sample.states.shape[2])
        summing.add(sample)
    if summing is None:
        raise ValueError("no states were added")
    return summing.figures()


def position_norms(norms: np.ndarray, places: np.ndarray) -> PositionNorms:
    """Of ``norms [n, L]`` of tokens at ``places [n]``."""
    ranges = np.where(places > 0, np.log2(np.maximum(places, 1)).astype(int) + 1, 0)
    numbers = np.unique(ranges)
    found = [
        [_quantiles(norms[ranges == number, layer], (0.05, 0.5, 0.95)) for number in numbers] for layer in _of(norms)
    ]
    low, medians, high = ([[range_[i] for range_ in layer] for layer in found] for i in range(3))
    starts = [0 if number == 0 else 2 ** (int(number) - 1) for number in numbers]
    return PositionNorms(starts=starts, medians=medians, low=low, high=high)


def _of(norms: np.ndarray) -> Iterator[int]:
    return iter(range(norms.shape[1]))


def _quantiles(values: np.ndarray, at: tuple[float, ...]) -> list[float]:
    """NaN left out; all 0 where nothing is left, since JSON has no NaN."""
    known = values[np.isfinite(values)]
    return [float(q) for q in np.quantile(known, at)] if len(known) else [0.0] * len(at)


def _largest_channels(sizes: np.ndarray, count: int) -> list[Channel]:
    energy, middle = float((sizes**2).sum()), float(np.median(sizes))
    largest = np.argsort(-sizes, kind="stable")[:count]
    return [
        Channel(
            channel=int(channel),
            size=float(sizes[channel]),
            times=float(sizes[channel] / middle) if middle > 0 else 0.0,
            share=float(sizes[channel] ** 2 / energy) if energy > 0 else 0.0,
        )
        for channel in largest
    ]
