"""How the report says things: numbers, metrics, candidates and untrusted text in words.

Takes values as they were read from JSON (any type may be there), gives strings. Nothing here is HTML; the templates and
the charts escape.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from ..score.metrics import METRIC_DIRECTION, base_metric

NOT_MEASURED = "NOT MEASURED"
MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Limits:
    """How much of each thing the page holds; what is left out is said where it is left out."""

    text: int = 800
    """Characters of one prompt, reference or output."""
    quarantine_rows: int = 8
    quarantine_text: int = 240
    findings: int = 20
    names: int = 80
    """Characters of a candidate's, gate's, metric's or phase's name."""
    recipe: int = 16_000
    """Characters of recipe.yaml."""
    candidates: int = 16
    metrics: int = 24
    entries: int = 200
    """Lines of the manifest, comparisons and few-shot trials, each."""
    curves: int = 24
    """Charts of one stage, besides its loss."""

    def smaller(self) -> Limits:
        """The same limits, each at a third."""
        return Limits(*(max(1, value // 3) for value in vars(self).values()))


@dataclass(frozen=True)
class Metric:
    """How one metric is read: its label and its unit."""

    label: str
    share: bool
    """A share between 0 and 1, written in percent."""
    sentence: str | None = None
    """What a value means, with {value} and {n}; None: the generic sentence."""


METRICS = {
    "exact_match": Metric("Exact match", True, sentence="answers {value} of {n} test items exactly right"),
    "field_accuracy": Metric("Field accuracy", True, sentence="fills {value} of the fields of {n} test items right"),
    "accuracy": Metric("Accuracy", True, sentence="answers {value} of {n} test items right"),
    "json_validity": Metric("Valid JSON", True, sentence="gives valid JSON for {value} of {n} test items"),
    "macro_f1": Metric("Macro F1", False),
    "rougeL": Metric("ROUGE-L", False),
    "perplexity": Metric("Perplexity", False),
    "gold_reward": Metric("Gold reward", False, sentence="has a gold reward of {value} on average over {n} test items"),
    "preference_accuracy": Metric("Preference accuracy", True, sentence="prefers the better answer in {value} of {n} test items"),
    "reward": Metric("Reward", False, sentence="has a reward of {value} on average over {n} test items"),
}

CANDIDATES = {
    "zero_shot": ("Zero-shot", "the same model without examples"),
    "few_shot": ("Few-shot", "the same model with examples in the prompt"),
    "prompted": ("Prompted", "the same model with a better prompt"),
    "retrieval": ("Retrieval", "the same model with retrieved examples"),
    "classical": ("Classical", "a classifier without a language model"),
    "tuned": ("Tuned", "the tuned model"),
    "tuned_few_shot": ("Tuned, few-shot", "the tuned model with examples in the prompt"),
    "tuned_prompted": ("Tuned, prompted", "the tuned model with a better prompt"),
    "tuned_retrieval": ("Tuned, retrieval", "the tuned model with retrieved examples"),
    "shorter": ("The shorter answer", "the rule that the shorter answer is the better one"),
}


def number(value: Any) -> float | None:
    """`value` as a finite float, or None: a boolean, a text, NaN and infinity are no numbers."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        as_float = float(value)
    except OverflowError:
        return None
    return as_float if math.isfinite(as_float) else None


def mapping(value: Any) -> dict[str, Any]:
    """`value` if it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def rows(value: Any) -> list[dict[str, Any]]:
    """The JSON objects in the list `value`; anything else is left out."""
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def text(value: Any, limit: int | None = None) -> str:
    """`value` as text that is safe to encode and to show: lone surrogates and control characters become visible signs.

    Bidirectional controls, which can make a text read other than it is, are shown as U+FFFD too.
    """
    if value is None:
        return ""
    raw = value if isinstance(value, str) else str(value)
    if limit is not None and len(raw) > limit:
        raw = raw[: max(1, limit - 1)] + "\N{HORIZONTAL ELLIPSIS}"
    return "".join(_visible(character) for character in raw)


def _visible(character: str) -> str:
    code = ord(character)
    if 0xD800 <= code <= 0xDFFF or 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069 or 0x7F <= code <= 0x9F:
        return "\N{REPLACEMENT CHARACTER}"
    if code < 0x20 and character not in "\n\t":
        return "" if character == "\r" else chr(0x2400 + code)
    return character


@dataclass(frozen=True)
class Excerpt:
    """The start of a text and the number of characters that were left out."""

    text: str
    cut: int


def excerpt(value: Any, limit: int) -> Excerpt:
    """The first `limit` characters of `value`, and how many there are beyond."""
    raw = value if isinstance(value, str) else "" if value is None else str(value)
    return Excerpt(text(raw[:limit]), max(0, len(raw) - limit))


def metric_of(name: str) -> Metric:
    """How `name` is read; an unknown one, or a part such as `field_accuracy.intent`, follows the part before the dot."""
    if name in METRICS:
        return METRICS[name]
    head, _, tail = name.partition(".")
    if head in METRICS:
        return Metric(f"{METRICS[head].label}: {text(tail)}", METRICS[head].share)
    readable = text(name).replace("_", " ")
    return Metric(readable[:1].upper() + readable[1:], share=name.endswith(("accuracy", "validity")))


def lower_is_better(name: str) -> bool:
    """Whether a smaller value of the metric is the better one."""
    return METRIC_DIRECTION.get(base_metric(name)) == "lower"


def candidate_label(name: str) -> str:
    """A short name for tables and charts."""
    return CANDIDATES[name][0] if name in CANDIDATES else text(name, 80)


def candidate_words(name: str, examples: int | None = None) -> str:
    """A candidate as a sentence's subject, in lower case; `examples` is few_shot's k."""
    if name == "few_shot" and examples is not None:
        return f"the same model with {examples} example{'' if examples == 1 else 's'} in the prompt"
    return CANDIDATES[name][1] if name in CANDIDATES else f"the model after stage {text(name, 80)}"


def advice(name: str, examples: int | None = None) -> str:
    """What to use, as an order: `Use the tuned model.`"""
    return f"Use {candidate_words(name, examples).replace('the same model', 'the base model')}."


def humane(value: Any) -> str:
    """Text of our own with the machine names in it as words: `tuned against few_shot` -> `tuned against few-shot`."""
    raw = value if isinstance(value, str) else "" if value is None else str(value)
    for name in (*CANDIDATES, *METRICS):
        if name in raw:
            said = CANDIDATES[name][0].lower() if name in CANDIDATES else METRICS[name].label
            raw = re.sub(rf"\b{name}\b", said if name == "rougeL" else said[:1].lower() + said[1:], raw)
    return capital(raw)


def capital(sentence: str) -> str:
    """The sentence with a capital first letter."""
    return sentence[:1].upper() + sentence[1:]


def count(value: Any) -> str:
    """A whole number with thousands separated: 12,345."""
    as_float = number(value)
    return NOT_MEASURED if as_float is None else f"{as_float:,.0f}"


def value_words(metric: str, value: float | None, digits: int = 1) -> str:
    """A metric's value: 71.3%, 0.64 or 5.28."""
    if value is None:
        return NOT_MEASURED
    if metric_of(metric).share:
        return f"{100 * value:.{digits}f}%"
    return plain(value)


def plain(value: float) -> str:
    """A number to three significant digits or so, without an exponent where that reads well."""
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}" if size < 1e7 else f"{value:.2e}"
    if size >= 100:
        return f"{value:.1f}"
    if size == 0 or size >= 0.01:
        return f"{value:.2f}"
    return f"{value:.2g}"


def signed(value: float, digits: int = 1) -> str:
    """A difference with its sign: +62.0 or a true minus."""
    shown = f"{abs(value):.{digits}f}"
    return f"{MINUS if value < 0 and float(shown) != 0 else '+'}{shown}"


def span(metric: str, low: float | None, high: float | None) -> str:
    """An interval: `64.0 to 78.0`, in the metric's unit without its sign."""
    if low is None or high is None:
        return f"interval {NOT_MEASURED}"
    if metric_of(metric).share:
        return f"{100 * low:.1f} to {100 * high:.1f}"
    return f"{plain(low)} to {plain(high)}"


def cost(value: float | None) -> str:
    """A cost in the price's unit, with two digits, of which nought would say that it is free."""
    if value is None:
        return NOT_MEASURED
    return f"{value:,.2f}" if value >= 0.01 or value == 0 else "less than 0.01"


def duration(seconds: float | None) -> str:
    """A time: 0.4 s, 34 s, 6.3 min, 2.1 h."""
    if seconds is None:
        return NOT_MEASURED
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def size(byte_count: float | None) -> str:
    """A size in bytes, in binary units: 1.42 GiB."""
    if byte_count is None:
        return NOT_MEASURED
    for unit, bytes_in_unit in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if byte_count >= bytes_in_unit:
            return f"{byte_count / bytes_in_unit:.3g} {unit}"
    return f"{byte_count:.0f} bytes"


def readable(name: Any, limit: int = 80) -> str:
    """A machine name as words: `near_duplicate` -> `Near duplicate`."""
    return capital(text(name, limit).replace("_", " ").strip())
