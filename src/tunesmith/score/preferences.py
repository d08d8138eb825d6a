"""Answers compared: which of a row's a candidate prefers, and what a reward model's scores depend on besides how good an answer is.

Takes for each item one number an answer, the preferred answer first; gives each item's accuracy, and for a reward model its calibration,
its leaning to long or short answers, and its accuracy by place. Pure functions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from scipy.stats import pearsonr, spearmanr

BINS = 10  # of the calibration, between a half and 1
SHORTER = "shorter"
"""The candidate that prefers the shorter answer: what a preference model has to beat to have learned more than length."""

Values = Sequence[Sequence[float]]
"""For each item a number an answer, the preferred answer first."""


def item_accuracy(values: Values) -> list[float]:
    """For each item the share of its pairs whose preferred answer has the larger number; a tie counts a half.

    >>> item_accuracy([[2.0, 1.0], [1.0, 1.0], [3.0, 1.0, 2.0]])
    [1.0, 0.5, 0.6666666666666666]
    """
    return [float(np.mean([_won(better, worse) for better, worse in _pairs(item)])) for item in values]


def reward_model_json(scores: Values, lengths: Values) -> dict[str, Any]:
    """Calibration, length bias and accuracy by place of a reward model. lengths: each answer's, in tokens."""
    return {
        "calibration": calibration(scores),
        "length_bias": length_bias(scores, lengths),
        "accuracy_by_place": accuracy_by_place(scores),
    }


def calibration(scores: Values) -> dict[str, Any]:
    """{"expected_calibration_error", "n"} of sigmoid(margin) as the probability that the preferred answer is preferred, over all pairs.

    The probability of the side that the model takes is compared with how often it is right, in BINS bins of equal width from 0.5 to 1,
    weighted by their pairs (Guo et al. 2017, arXiv:1706.04599).
    """
    margins = np.array([better - worse for item in scores for better, worse in _pairs(item)], dtype=np.float64)
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    right = np.where(margins == 0, 0.5, margins > 0)
    bins = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    gaps = [abs(float((right[bins == b] - confidence[bins == b]).sum())) for b in range(BINS)]
    return {"expected_calibration_error": sum(gaps) / len(margins) if len(margins) else None, "n": len(margins)}


def length_bias(scores: Values, lengths: Values) -> dict[str, Any]:
    """Correlation of score and length over all answers, and the accuracy on pairs whose preferred answer is the shorter or the longer.

    A correlation is None where scores or lengths do not vary.
    """
    flat_scores, flat_lengths = (np.array([one for item in part for one in item], dtype=np.float64) for part in (scores, lengths))
    varies = len(flat_scores) > 1 and np.ptp(flat_scores) > 0 and np.ptp(flat_lengths) > 0
    pairs = [(s, t) for item, sizes in zip(scores, lengths, strict=True) for s, t in zip(_pairs(item), _pairs(sizes), strict=True)]
    shorter = [_won(*s) for s, t in pairs if t[0] < t[1]]
    longer = [_won(*s) for s, t in pairs if t[0] > t[1]]
    return {
        "pearson": float(pearsonr(flat_scores, flat_lengths).statistic) if varies else None,
        "spearman": float(spearmanr(flat_scores, flat_lengths).statistic) if varies else None,
        "n": len(flat_scores),
        "accuracy_where_shorter_is_preferred": _share(shorter),
        "accuracy_where_longer_is_preferred": _share(longer),
    }


def accuracy_by_place(scores: Values) -> list[dict[str, Any]]:
    """For each place of a ranking but the last, the share of its comparisons with later places that are won: [{"place", "value", "n"}]."""
    won: dict[int, list[float]] = {}
    for item in scores:
        for place in range(len(item) - 1):
            won.setdefault(place + 1, []).extend(_won(item[place], worse) for worse in item[place + 1 :])
    return [{"place": place, **_share(found)} for place, found in sorted(won.items())]


def _pairs(item: Sequence[float]) -> Iterator[tuple[float, float]]:
    """(better, worse) of all pairs, in order."""
    return ((better, worse) for i, better in enumerate(item) for worse in item[i + 1 :])


def _won(better: float, worse: float) -> float:
    return 0.5 if better == worse else float(better > worse)


def _share(won: Sequence[float]) -> dict[str, Any]:
    return {"value": sum(won) / len(won) if won else None, "n": len(won)}
