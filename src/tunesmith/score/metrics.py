"""Every metric's direction and unit, in one table each.

Takes a metric's name ("exact_match", "field_accuracy.intent"), gives whether higher or lower is better. Whoever decides a
gate or draws an arrow asks here and nowhere else.
"""

from __future__ import annotations

import difflib
from typing import Literal

from ..errors import RecipeError
from ..recipe.task import METRICS_KNOWN_AS

Direction = Literal["higher", "lower"]

METRIC_DIRECTION: dict[str, Direction] = {
    "exact_match": "higher",
    "field_accuracy": "higher",
    "macro_f1": "higher",
    "rougeL": "higher",
    "json_validity": "higher",
    "gold_reward": "higher",
    "preference_accuracy": "higher",
    "reward": "higher",
    "perplexity": "lower",
}

METRIC_UNIT: dict[str, str] = {
    "exact_match": "share of items",
    "field_accuracy": "share of fields",
    "macro_f1": "F1, mean over labels",
    "rougeL": "F-measure, mean over items",
    "json_validity": "share of items",
    "gold_reward": "mean of the checks, each 0 to 1",
    "preference_accuracy": "share of items, ties a half",
    "reward": "mean score of the reward model",
    "perplexity": "exp(nats per token)",
}

PREFERENCE = "preference_accuracy"
OF_ANSWERS = ("gold_reward", "reward")
"""Metrics of an answer that need no reference."""
NEED_REFERENCE = ("exact_match", "field_accuracy", "macro_f1", "rougeL", "json_validity", "perplexity")
"""Metrics that compare with a reference, or are scored together with those that do."""


def base_metric(metric: str) -> str:
    """The table's name of a metric: `field_accuracy.intent` is a `field_accuracy`."""
    return metric.split(".", 1)[0]


def direction(metric: str, where: str = "metric") -> Direction:
    """Whether higher or lower is better. where: the place that names the metric, for the error.

    Raises RecipeError, with the nearest name, for a metric that no table knows.

    >>> direction("perplexity"), direction("field_accuracy.intent")
    ('lower', 'higher')
    """
    known = METRIC_DIRECTION.get(base_metric(metric))
    if known is None:
        near = [METRICS_KNOWN_AS[metric.lower()]] if metric.lower() in METRICS_KNOWN_AS else []
        near = near or difflib.get_close_matches(base_metric(metric), METRIC_DIRECTION, n=1)
        mend = f"did you mean {near[0]}?" if near else f"known metrics: {', '.join(METRIC_DIRECTION)}"
        raise RecipeError(f"unknown metric {metric!r}", where=where, mend=mend)
    return known


def improvement_sign(metric: str) -> int:
    """+1 where a positive difference is an improvement, -1 where a negative one is."""
    return 1 if direction(metric) == "higher" else -1
