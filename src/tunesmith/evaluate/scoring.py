"""From a candidate's answers to its scores on one task: per item, and as statistics that the bootstrap can resample.

Takes the task, the answers and the references' nats; gives `Scored`, which knows which items and which chat template it was measured
with: two that differ are never compared.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..score import Average, ItemScore, MacroF1, Mean, bootstrap_interval
from ..score.metrics import NEED_REFERENCE, PREFERENCE
from ..score.statistics import Statistic
from .perplexity import ReferenceNats
from .task import LABEL_FIELD, Task


@dataclass(frozen=True)
class Scored:
    """One candidate on one task. template_sha256 is None for a candidate that uses no chat template.

    statistics: metric to statistic over the task's items. not_measured: metric to the reason why there is no number. fills_whole_answer:
    whether it can write what is asked for; one that fills labels only, or compares answers, cannot, and is never recommended.
    """

    candidate: str
    task: str
    task_sha256: str
    template_sha256: str | None
    statistics: dict[str, Statistic]
    item_scores: tuple[dict[str, float], ...] = ()
    not_measured: dict[str, str] = field(default_factory=dict)
    fills_whole_answer: bool = True

    def metrics_json(self, *, resamples: int, confidence: float, seed: int) -> dict[str, dict[str, float | int | None]]:
        """{metric: {"value", "low", "high", "n"}}."""
        found = {}
        for metric, statistic in self.statistics.items():
            interval = bootstrap_interval(statistic, resamples=resamples, confidence=confidence, seed=seed)
            found[metric] = {"value": interval.value, "low": interval.low, "high": interval.high, "n": interval.n}
        return found

    def with_metric(self, metric: str, values: Sequence[float], bounds: tuple[float, float] | None = (0.0, 1.0)) -> Scored:
        """With one more number for each item, whose mean is the metric."""
        items = tuple({**scores, metric: float(value)} for scores, value in zip(self.item_scores, values, strict=True))
        return replace(self, item_scores=items, statistics={**self.statistics, metric: Mean(values, bounds)})

    def without_metric(self, metric: str, reason: str) -> Scored:
        """With the reason why a metric has no number."""
        return replace(self, not_measured={**self.not_measured, metric: reason})


def score_answers(task: Task, candidate: str, outputs: Sequence[str], nats: ReferenceNats | None, *, template_sha256: str | None) -> Scored:
    """Scores one output an item (ValueError unless there are as many), and the references' perplexity where it was measured.

    Where an item has no reference, nothing is measured against one, and the reasons say so.
    """
    if len(outputs) != len(task.items):
        raise ValueError(f"{len(task.items)} items but {len(outputs)} outputs")
    if not task.has_references:
        return unscored(task, candidate, template_sha256=template_sha256)
    scored = [task.score(output, item.reference) for output, item in zip(outputs, task.items, strict=True)]
    item_scores = [dict(one.scores) for one in scored]
    statistics = _statistics(task, scored) if scored else {}
    if nats is not None and nats.tokens:
        _add_perplexity(item_scores, nats)
        statistics["perplexity"] = nats.statistic
    return Scored(candidate, task.name, task.sha256, template_sha256, statistics, tuple(item_scores))


def unscored(task: Task, candidate: str, *, template_sha256: str | None) -> Scored:
    """No number yet: what needs a reference is not measured where an item has none, other metrics are added."""
    empty = tuple({} for _ in task.items)
    return Scored(candidate, task.name, task.sha256, template_sha256, {}, empty, task.without_reference)


def score_references(task: Task, candidate: str, nats: ReferenceNats, *, template_sha256: str) -> Scored:
    """Scores by the references' perplexity alone: the guard set, on which nothing is generated."""
    item_scores: list[dict[str, float]] = [{} for _ in task.items]
    _add_perplexity(item_scores, nats)
    statistics: dict[str, Statistic] = {"perplexity": nats.statistic} if nats.tokens else {}
    return Scored(candidate, task.name, task.sha256, template_sha256, statistics, tuple(item_scores))


def score_labels(task: Task, candidate: str, labels: Sequence[dict[str, str]]) -> Scored:
    """Scores a candidate that fills label fields only; the rest of the answer is not measured."""
    expected = [task.reference_labels(item.reference) for item in task.items]
    scored = []
    for ours, truth in zip(labels, expected, strict=True):
        right = {name: float(ours[name] == truth[name]) for name in task.label_fields}
        scores = {"exact_match": float(all(right.values()))}
        if task.fields:
            scores["field_accuracy"] = sum(right.values()) / len(right)
            scores.update({f"field_accuracy.{name}": value for name, value in right.items()})
        scored.append(ItemScore(scores, dict(ours)))
    missing = {"perplexity": "it gives no probability to a text"}
    if task.fields:
        missing["json_validity"] = "it fills label fields and writes no JSON"
    if task.text_fields:
        missing["rougeL"] = f"it cannot write {', '.join(task.text_fields)}"
    statistics = _statistics(task, scored) if scored else {}
    if task.fields and task.fields.values:
        reason = f"it cannot fill {', '.join(task.fields.values)}"
        for metric in ("exact_match", "field_accuracy"):
            statistics.pop(metric, None)
            missing[metric] = reason
    return Scored(
        candidate,
        task.name,
        task.sha256,
        None,
        statistics,
        tuple(one.scores for one in scored),
        {metric: reason for metric, reason in missing.items() if metric in (*task.metrics, "perplexity")},
        task.labels_are_all,
    )


def chance_values(task: Task) -> dict[str, dict[str, float | int]]:
    """What the best constant answer scores: the most frequent reference (by its labels), given to every item; {metric: {value, n}}.

    Of answers to be compared a half is what a coin gets right.
    """
    if not task.items:
        return {}
    if not task.has_references:
        return {PREFERENCE: {"value": 0.5, "n": len(task.items)}} if task.is_compared else {}
    keys = [tuple(task.reference_labels(item.reference).values()) or item.reference.strip() for item in task.items]
    common = Counter(keys).most_common(1)[0][0]
    constant = task.items[keys.index(common)].reference
    scored = score_answers(task, "constant", [constant] * len(task.items), None, template_sha256=None)
    values = scored.metrics_json(resamples=1, confidence=0.95, seed=0)
    found: dict[str, dict[str, float | int]] = {metric: {"value": one["value"], "n": one["n"]} for metric, one in values.items()}
    if "json_validity" in found:
        found["json_validity"]["value"] = 0.0
    return found


def _statistics(task: Task, scored: Sequence[ItemScore]) -> dict[str, Statistic]:
    """The task's metrics in its order, each followed by its parts (field_accuracy.intent, macro_f1.intent)."""
    found: dict[str, Statistic] = {}
    expected = [task.reference_labels(item.reference) for item in task.items] if "macro_f1" in task.metrics else []
    for metric in dict.fromkeys(("exact_match", *task.metrics)):
        if metric not in NEED_REFERENCE:
            continue
        if metric == "macro_f1":
            parts = {
                name: MacroF1([truth[name] for truth in expected], [one.labels.get(name) for one in scored]) for name in task.label_fields
            }
            found[metric] = Average(list(parts.values()))
            if task.label_fields != (LABEL_FIELD,):
                found.update({f"macro_f1.{name}": part for name, part in parts.items()})
        else:
            names = [name for name in scored[0].scores if name == metric or name.startswith(f"{metric}.")]
            found.update({name: Mean([one.scores[name] for one in scored]) for name in names})
    return found


def _add_perplexity(item_scores: Sequence[dict[str, float]], nats: ReferenceNats) -> None:
    for scores, total, tokens in zip(item_scores, nats.nats, nats.tokens, strict=True):
        scores["nats"] = total
        scores["tokens"] = tokens
        scores["perplexity"] = math.exp(min(total / tokens, 700.0))


def generation_json(outputs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How a candidate's outputs ended: mean tokens, how many the token limit cut, and n."""
    n = len(outputs)
    mean = sum(one["tokens"] for one in outputs) / n if n else None
    return {"mean_output_tokens": mean, "cut_by_length": sum(one["finish_reason"] == "length" for one in outputs), "n": n}
