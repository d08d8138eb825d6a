"""Intervals and paired differences by the bootstrap; pure, seeded, vectorised.

A metric is a statistic: a function of how often each item counts, `weights[R, N] -> values[R]` for R resamples of N items. The mean,
macro-F1 (by confusion counts) and perplexity (sums of nats and tokens) are all such functions, so one bootstrap serves them all, and a
paired one is the same resamples given to both sides. Dimensions: R resamples, N items, L labels.

Intervals are percentile intervals (Efron 1979) with Hesterberg's expansion for small n (arXiv:1411.5279): at 150 items it widens by
1%, at 10 by a fifth. Where no resample differs from the others (all items right, say) a bootstrap would claim
certainty; a bounded metric then gets Clopper and Pearson's exact bound on the share of items that behave unlike all those seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy.special import ndtr, ndtri, stdtrit

_CHUNK_ELEMENTS = 2_000_000
"""Elements of one weights[R, N] block: 16 MB of float64."""
POWER = 0.8
"""Probability of showing an effect of the minimum detectable size (Cohen's convention)."""


class Statistic(Protocol):
    """A metric over N items: called with weights[R, N] (how often each item counts) it gives values[R]."""

    n: int
    bounds: tuple[float, float] | None

    def __call__(self, weights: np.ndarray) -> np.ndarray: ...


class Mean:
    """The mean of per-item scores[N], each within `bounds`."""

    def __init__(self, scores: Sequence[float] | np.ndarray, bounds: tuple[float, float] | None = (0.0, 1.0)):
        self.scores = np.asarray(scores, dtype=np.float64)
        self.n, self.bounds = len(self.scores), bounds

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        return weights @ self.scores / weights.sum(axis=1)


class MacroF1:
    """F1 averaged over the labels that occur among the (resampled) references; a label never predicted right has F1 0.

    references, predictions: N labels each; a prediction of None (no valid answer) is wrong for whatever it should have been.
    Equals sklearn's f1_score(average="macro", zero_division=0, labels=those of the references).
    """

    bounds: tuple[float, float] | None = (0.0, 1.0)

    def __init__(self, references: Sequence[str], predictions: Sequence[str | None]):
        if len(references) != len(predictions):
            raise ValueError(f"{len(references)} references but {len(predictions)} predictions")
        self.n = len(references)
        codes = {label: code for code, label in enumerate(sorted(set(references)))}
        is_reference, is_prediction = np.zeros((2, self.n, len(codes)))
        is_reference[np.arange(self.n), [codes[label] for label in references]] = 1.0
        for item, label in enumerate(predictions):
            if label in codes:
                is_prediction[item, codes[label]] = 1.0
        self._columns = np.concatenate([is_reference, is_prediction, is_reference * is_prediction], axis=1)

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        expected, predicted, right = np.split(weights @ self._columns, 3, axis=1)
        present = expected > 0
        f1 = np.divide(2.0 * right, expected + predicted, out=np.zeros_like(right), where=present)
        return f1.sum(axis=1) / present.sum(axis=1)


class Average:
    """The plain average of several statistics over the same items (macro_f1 over the label fields)."""

    def __init__(self, parts: Sequence[Statistic]):
        self.parts, self.n, self.bounds = tuple(parts), parts[0].n, parts[0].bounds

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        return np.mean([part(weights) for part in self.parts], axis=0)


class Perplexity:
    """exp(sum of nats / number of tokens) over items of nats[N] and tokens[N]; each token counts once."""

    bounds: tuple[float, float] | None = None

    def __init__(self, nats: Sequence[float] | np.ndarray, tokens: Sequence[int] | np.ndarray):
        self.nats, self.tokens = np.asarray(nats, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
        if self.nats.shape != self.tokens.shape or (self.tokens <= 0).any():
            raise ValueError("perplexity needs one sum of nats and at least one token for each item")
        self.n = len(self.nats)

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        return np.exp(weights @ self.nats / (weights @ self.tokens))


@dataclass(frozen=True)
class Interval:
    """A metric's value with its interval; low and high are None where n items allow none."""

    value: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class PairedDifference:
    """candidate - baseline (or candidate / baseline - 1) on the same n items.

    minimum_detectable: the smallest true difference that such a comparison shows with probability POWER; None where nothing varies.
    """

    difference: float
    low: float | None
    high: float | None
    n: int
    standard_error: float
    minimum_detectable: float | None


def resampled(statistics: Sequence[Statistic], combine: Callable[..., np.ndarray], *, resamples: int, seed: int) -> np.ndarray:
    """combine(values of each statistic) over `resamples` resamples with replacement, the same ones for every statistic: [R]."""
    n = statistics[0].n
    return np.concatenate([combine(*(statistic(weights) for statistic in statistics)) for weights in _weights(n, resamples, seed)])


def bootstrap_interval(statistic: Statistic, *, resamples: int = 2000, confidence: float = 0.95, seed: int = 0) -> Interval:
    """The statistic over its n items, and its interval at `confidence`.

    >>> bootstrap_interval(Mean([1.0] * 30 + [0.0] * 70))
    Interval(value=0.3, low=0.21, high=0.39, n=100)
    """
    _check(statistic.n)
    value = float(statistic(np.ones((1, statistic.n)))[0])
    samples = resampled([statistic], lambda values: values, resamples=resamples, seed=seed)
    low, high = _limits(value, samples, statistic.n, confidence, statistic.bounds)
    return Interval(value, low, high, statistic.n)


def paired_bootstrap(
    candidate: Statistic,
    baseline: Statistic,
    *,
    relative: bool = False,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> PairedDifference:
    """The difference of two statistics over the same items in the same order, both on the same resamples.

    relative: candidate / baseline - 1 in place of candidate - baseline. Raises ValueError where the item counts differ.
    """
    if candidate.n != baseline.n:
        raise ValueError(f"a paired comparison needs the same items: {candidate.n} and {baseline.n}")
    _check(candidate.n)
    combine = (lambda a, b: a / b - 1.0) if relative else (lambda a, b: a - b)
    ones = np.ones((1, candidate.n))
    value = float(combine(candidate(ones), baseline(ones))[0])
    samples = resampled([candidate, baseline], combine, resamples=resamples, seed=seed)
    bounds = None
    if candidate.bounds and baseline.bounds and not relative:
        bounds = (candidate.bounds[0] - baseline.bounds[1], candidate.bounds[1] - baseline.bounds[0])
    low, high = _limits(value, samples, candidate.n, confidence, bounds)
    if _constant(samples):
        error = 0.0 if low is None or high is None else (high - low) / 2 / float(ndtri((1 + confidence) / 2))
    else:
        error = float(samples.std() * math.sqrt(candidate.n / (candidate.n - 1)))
    detectable = minimum_detectable_effect(error, confidence=confidence) if error > 0 else None
    return PairedDifference(value, low, high, candidate.n, error, detectable)


def minimum_detectable_effect(standard_error: float, *, confidence: float = 0.95, power: float = POWER) -> float:
    """The true difference that a two-sided test at `confidence` shows with probability `power`: (z + z_power) x standard error.

    standard_error: of the paired difference, in the metric's unit; so is the result.

    >>> round(minimum_detectable_effect(0.01), 4)
    0.028
    """
    return float((ndtri((1 + confidence) / 2) + ndtri(power)) * standard_error)


def minimum_items(confidence: float = 0.95) -> int:
    """The fewest items on which anything can be shown: with fewer, a two-sided sign test fails even if every item agrees.

    >>> minimum_items(0.95), minimum_items(0.99)
    (6, 8)
    """
    return math.ceil(1 + math.log2(1 / (1 - confidence)))


def _check(n: int) -> None:
    if n < 1:
        raise ValueError("no items: there is nothing to measure")


def _weights(n: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Blocks of weights[R, N]: each row says how often each item was drawn in n draws with replacement."""
    rng = np.random.default_rng(seed)
    block = max(1, _CHUNK_ELEMENTS // n)
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        drawn = rng.integers(0, n, size=(rows, n)) + n * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)


def _constant(samples: np.ndarray) -> bool:
    return float(np.ptp(samples)) <= 1e-12 * max(1.0, float(np.abs(samples).max()))


def _limits(
    value: float, samples: np.ndarray, n: int, confidence: float, bounds: tuple[float, float] | None
) -> tuple[float | None, float | None]:
    tail = (1 - confidence) / 2
    if _constant(samples):
        if bounds is None:
            return (None, None) if n == 1 else (value, value)
        unseen = 1 - tail ** (1 / n)
        return value - unseen * (value - bounds[0]), value + unseen * (bounds[1] - value)
    expanded = float(ndtr(math.sqrt(n / (n - 1)) * stdtrit(n - 1, tail)))
    low, high = np.quantile(samples, [expanded, 1 - expanded])
    return float(low), float(high)
