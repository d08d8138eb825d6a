"""Metrics and statistics: pure functions from outputs and references to numbers with intervals."""

from .metrics import METRIC_DIRECTION, METRIC_UNIT, direction, improvement_sign
from .statistics import (
    Average,
    Interval,
    MacroF1,
    Mean,
    PairedDifference,
    Perplexity,
    bootstrap_interval,
    minimum_detectable_effect,
    minimum_items,
    paired_bootstrap,
)
from .structured import ItemScore, OutputFields, canonical, parse_output, score_structured
from .text import exact_match, rouge_l

__all__ = [
    "METRIC_DIRECTION",
    "METRIC_UNIT",
    "Average",
    "Interval",
    "ItemScore",
    "MacroF1",
    "Mean",
    "OutputFields",
    "PairedDifference",
    "Perplexity",
    "bootstrap_interval",
    "canonical",
    "direction",
    "exact_match",
    "improvement_sign",
    "minimum_detectable_effect",
    "minimum_items",
    "paired_bootstrap",
    "parse_output",
    "rouge_l",
    "score_structured",
]
