"""Comparisons, gates, verdict and recommendation; all by paired intervals on the same items.

Takes `Scored` results; gives the parts of evaluation.json. What was not measured reads NOT MEASURED and can never help a verdict, nor can
a guard that the baseline itself does not pass above chance.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import DataRefused, RecipeError, TemplateError
from ..recipe.evaluate import Gate
from ..score import PairedDifference, bootstrap_interval, direction, improvement_sign, minimum_items, paired_bootstrap
from ..score.metrics import METRIC_UNIT, PREFERENCE, base_metric
from .candidates import COST_ORDER
from .scoring import Scored
from .task import Task

PASS, FAIL, NOT_MEASURED = "PASS", "FAIL", "NOT MEASURED"


@dataclass(frozen=True)
class Bootstrap:
    """How every interval is made."""

    resamples: int = 2000
    confidence: float = 0.95
    seed: int = 0


Results = Mapping[tuple[str, str], Scored]
"""(task, candidate) to its scores."""
Chance = Mapping[str, Mapping[str, Mapping[str, float | int]]]
"""Task and metric to {"value", "n"}: what needs no skill."""


def check_gates(gates: Iterable[Gate], task: Task | None) -> None:
    """Refuses, before anything is trained, a gate whose metric its task cannot have (RecipeError)."""
    for position, gate in enumerate(gates):
        where = f"evaluate.gates.{position}.metric"
        direction(gate.metric, where)  # refuses an unknown one
        if gate.task == "general" and gate.metric != "perplexity":
            raise RecipeError(f"the general set is measured by perplexity, not {gate.metric}", where=where, mend="write metric: perplexity")
        if gate.task != "task" or task is None:
            continue
        name, _, part = gate.metric.partition(".")
        if name not in {"perplexity", "exact_match", *task.metrics}:
            raise RecipeError(f"{gate.metric} is not measured", where=where, mend=f"add {name} to task.metrics")
        parts = {"field_accuracy": task.fields.exact, "macro_f1": task.label_fields}.get(name, ()) if task.fields else ()
        if part not in {"", *parts} and name != "gold_reward":  # whose checks are known when they are asked
            mend = f"{name} has the parts {', '.join(parts)}" if parts else f"write {name}"
            raise RecipeError(f"{gate.metric} is not measured: {name} has no part {part!r}", where=where, mend=mend)


def paired_difference(candidate: Scored, baseline: Scored, metric: str, bootstrap: Bootstrap) -> PairedDifference | None:
    """The paired difference in a metric, None where either side was not measured; for perplexity the ratio minus 1.

    Raises DataRefused for scores on different items and TemplateError for scores through different chat templates.
    """
    if candidate.task_sha256 != baseline.task_sha256:
        raise DataRefused(
            "the scores are of different items and cannot be compared",
            where=f"{candidate.candidate} and {baseline.candidate} on {candidate.task}",
            mend="evaluate both on the same test file",
        )
    templates = {candidate.template_sha256, baseline.template_sha256} - {None}
    if len(templates) > 1:
        raise TemplateError(
            "the scores were made through different chat templates and cannot be compared",
            where=f"{candidate.candidate} and {baseline.candidate} on {candidate.task}",
            mend="evaluate both again with one template",
        )
    ours, theirs = candidate.statistics.get(metric), baseline.statistics.get(metric)
    if ours is None or theirs is None:
        return None
    return paired_bootstrap(
        ours,
        theirs,
        relative=metric == "perplexity",
        resamples=bootstrap.resamples,
        confidence=bootstrap.confidence,
        seed=bootstrap.seed,
    )


def comparisons(results: Results, gates: Sequence[Gate], bootstrap: Bootstrap, *, same: str = "") -> list[dict[str, Any]]:
    """Every gate's comparison, then tuned against every other candidate in every metric both have; no pair twice.

    same: a candidate that is the tuned model by another name.
    """
    pairs = [(gate.task, gate.metric, gate.candidate, gate.better_than or gate.not_worse_than) for gate in gates]
    for (task, name), scored in results.items():
        if name not in ("tuned", same) and (task, "tuned") in results:
            pairs += [(task, metric, "tuned", name) for metric in results[task, "tuned"].statistics if metric in scored.statistics]
    rows = []
    for task, metric, candidate, baseline in dict.fromkeys(pairs):
        ours, theirs = results.get((task, candidate)), results.get((task, baseline))
        found = paired_difference(ours, theirs, metric, bootstrap) if ours and theirs else None
        if found is None:
            continue
        rows.append(
            {
                "task": task,
                "metric": metric,
                "candidate": candidate,
                "baseline": baseline,
                "difference": found.difference,
                "low": found.low,
                "high": found.high,
                "minimum_detectable": found.minimum_detectable,
                "n": found.n,
                "unit": "ratio minus 1" if metric == "perplexity" else METRIC_UNIT[base_metric(metric)],
            }
        )
    return rows


def decide_gates(gates: Sequence[Gate], results: Results, bootstrap: Bootstrap, chance: Chance) -> list[dict[str, Any]]:
    """[{"name", "result", "reason"}], one for each gate, in their order."""
    decided = []
    for gate in gates:
        result, reason = _decide(gate, results, bootstrap, chance)
        decided.append({"name": gate_name(gate), "result": result, "reason": reason})
    return decided


def gate_name(gate: Gate) -> str:
    """The gate in a line.

    >>> gate_name(Gate(metric="exact_match", better_than="few_shot"))
    'tuned better than few_shot in exact_match on task'
    """
    relation = f"better than {gate.better_than}" if gate.better_than else f"not worse than {gate.not_worse_than}"
    margin = f" by more than {gate.margin:g}" if gate.margin else ""
    return f"{gate.candidate} {relation}{margin} in {gate.metric} on {gate.task}"


def verdict(gates: Sequence[Mapping[str, Any]]) -> str:
    """PASS only if every gate passes; FAIL if any fails; NOT MEASURED otherwise, so also without gates."""
    results = {gate["result"] for gate in gates}
    if FAIL in results:
        return FAIL
    return PASS if results == {PASS} else NOT_MEASURED


def recommend(
    results: Results, gates: Sequence[Gate], decided: Sequence[Mapping[str, Any]], bootstrap: Bootstrap, *, stages: Sequence[str] = ()
) -> dict[str, Any]:
    """{"candidate", "reason"}: the best of those that can fill the whole answer, or a simpler one that is not shown to be worse.

    Measured by the metric of the first gate on the task, else exact_match, else what tells answers apart without a reference. stages: the
    candidates that are stages' results, in order; they cost more than an untuned model and less than the tuned one. candidate is None where
    nothing was measured, on fewer items than can show anything, where there is nothing to compare, and where nothing was right.
    """
    metric = next((gate.metric for gate in gates if gate.task == "task"), None) or _first_measured(results)
    able = [
        scored
        for name in (*COST_ORDER[:-1], *stages, COST_ORDER[-1])
        if (scored := results.get(("task", name))) and metric in scored.statistics and scored.fills_whole_answer
    ]
    if not able:
        return {"candidate": None, "reason": f"{NOT_MEASURED}: no candidate has {metric} on a test set."}
    values = {scored.candidate: _value(scored, metric) for scored in able}
    best = max(able, key=lambda scored: improvement_sign(metric) * values[scored.candidate])
    n, least = best.statistics[metric].n, minimum_items(bootstrap.confidence)
    if n < least:
        words = f"n = {n} items cannot show anything at {bootstrap.confidence:.0%}; at least {least} are needed"
        return {"candidate": None, "reason": f"{NOT_MEASURED}: {words}."}
    found = f"{metric} {values[best.candidate]:.3f} on {n} items"
    measured = [_value(scored, metric) for (task, _), scored in results.items() if task == "task" and metric in scored.statistics]
    if len(measured) == 1:
        return {"candidate": None, "reason": f"{NOT_MEASURED}: {best.candidate} alone was measured ({found}); there is nothing to compare."}
    if not any(values.values()):
        return {"candidate": None, "reason": f"no candidate got anything right: {found} for each."}
    sign = improvement_sign(metric)
    among = " of those that give whole answers" if max(sign * value for value in measured) > sign * values[best.candidate] else ""
    alike = [one.candidate for one in able[able.index(best) + 1 :] if values[one.candidate] == values[best.candidate]]
    equals = f", as {' and '.join(alike)} {'has' if len(alike) == 1 else 'have'}, at a higher cost" if alike else ""
    reason = f"{best.candidate} has the best {metric}{among}: {values[best.candidate]:.3f} on {n} items{equals}"
    chosen = best
    for scored in able[: able.index(best)]:
        against = paired_difference(best, scored, metric, bootstrap)
        words = _difference_words(best.candidate, scored.candidate, metric, against, bootstrap)
        if not _shown_better(against, metric, bootstrap.confidence):
            chosen = scored
            reason += f"; but {scored.candidate} asks for less and is not shown to be worse: {values[scored.candidate]:.3f}, {words}"
            break
        reason += f"; {words}"
    failed = [gate["name"] for gate in decided if gate["result"] == FAIL and gate["name"].startswith(f"{chosen.candidate} ")]
    reason += f"; but it fails a gate ({'; '.join(failed)})" if failed else ""
    return {"candidate": chosen.candidate, "reason": reason + "."}


def _first_measured(results: Results) -> str:
    known = {metric for (task, _), scored in results.items() if task == "task" for metric in scored.statistics}
    return next((metric for metric in ("exact_match", "gold_reward", PREFERENCE, "reward") if metric in known), "exact_match")


def _decide(gate: Gate, results: Results, bootstrap: Bootstrap, chance: Chance) -> tuple[str, str]:
    baseline_name = gate.better_than or gate.not_worse_than
    for name in (gate.candidate, baseline_name):
        missing = _missing(results.get((gate.task, name)), gate.metric)
        if missing:
            return NOT_MEASURED, f"{name} on {gate.task}: {missing}."
    candidate, baseline = results[gate.task, gate.candidate], results[gate.task, baseline_name]
    found = paired_difference(candidate, baseline, gate.metric, bootstrap)
    if found is None or found.low is None or found.high is None or found.n < minimum_items(bootstrap.confidence):
        n, least = candidate.statistics[gate.metric].n, minimum_items(bootstrap.confidence)
        return NOT_MEASURED, f"n = {n} items cannot show anything at {bootstrap.confidence:.0%}; at least {least} are needed."
    words = _difference_words(gate.candidate, baseline_name, gate.metric, found, bootstrap)
    level = chance.get(gate.task, {}).get(gate.metric)
    if gate.not_worse_than and level is not None:
        able = [_above_chance(scored, gate.metric, float(level["value"]), bootstrap) for scored in (baseline, candidate)]
        # On the guard set only the base counts; on the task a candidate with skill of its own may stand against a baseline without.
        if not able[0] and (gate.task == "general" or not able[1]):
            value = _value(baseline, gate.metric)
            return (
                NOT_MEASURED,
                f"{baseline_name} itself is not above chance ({gate.metric} {value:.4g}, chance {level['value']:.4g}, n = {found.n}), "
                "so staying near it shows nothing.",
            )
    low, high = sorted(improvement_sign(gate.metric) * end for end in (found.low, found.high))
    if gate.better_than:
        return _better(low, high, gate.margin, words, found)
    if low >= -gate.margin:
        return PASS, f"{words}; the whole interval is within the margin of {gate.margin:g}."
    how = "worse by more than" if high < -gate.margin else "not shown to stay within"
    return FAIL, f"{how} the margin of {gate.margin:g}: {words}{_detectable_words(found)}."


def _better(low: float, high: float, margin: float, words: str, found: PairedDifference) -> tuple[str, str]:
    if low > margin:
        return PASS, f"{words}; the whole interval is better than {margin:g}."
    if high < 0:
        return FAIL, f"worse: {words}."
    if low > 0:
        return FAIL, f"better, but not shown to be so by more than the margin of {margin:g}: {words}{_detectable_words(found)}."
    return FAIL, f"not shown: the interval includes zero: {words}{_detectable_words(found)}."


def _above_chance(scored: Scored, metric: str, level: float, bootstrap: Bootstrap) -> bool:
    interval = bootstrap_interval(
        scored.statistics[metric], resamples=bootstrap.resamples, confidence=bootstrap.confidence, seed=bootstrap.seed
    )
    if interval.low is None or interval.high is None:
        return False
    return interval.low > level if improvement_sign(metric) > 0 else interval.high < level


def _missing(scored: Scored | None, metric: str) -> str | None:
    if scored is None:
        return "was not evaluated"
    if metric in scored.statistics:
        return None
    return f"{metric} was not measured" + (f": {scored.not_measured[metric]}" if metric in scored.not_measured else "")


def _shown_better(found: PairedDifference, metric: str, confidence: float) -> bool:
    if found.low is None or found.high is None or found.n < minimum_items(confidence):
        return False
    return min(improvement_sign(metric) * found.low, improvement_sign(metric) * found.high) > 0


def _value(scored: Scored, metric: str) -> float:
    return bootstrap_interval(scored.statistics[metric], resamples=1).value


def _difference_words(candidate: str, baseline: str, metric: str, found: PairedDifference, bootstrap: Bootstrap) -> str:
    ends = NOT_MEASURED
    if found.low is not None and found.high is not None:
        ends = f"[{_signed(found.low, metric)}, {_signed(found.high, metric)}]"
    measure = "perplexity ratio" if metric == "perplexity" else metric
    return (
        f"{candidate} against {baseline}, {measure} {_signed(found.difference, metric)}, "
        f"{bootstrap.confidence:.0%} interval {ends}, n = {found.n}"
    )


def _detectable_words(found: PairedDifference) -> str:
    if found.minimum_detectable is None:
        return ""
    return f"; the minimum detectable effect is {found.minimum_detectable:.3g} with {found.n} items"


def _signed(value: float, metric: str) -> str:
    return f"{value:+.1%}" if metric == "perplexity" else f"{value:+.3f}"
