"""The head of the report: the verdict, what it means in plain words, the recommendation and the gates.

Takes `RunFiles`; gives a dictionary for templates/verdict.html. A verdict of PASS that its own gates contradict is not shown.
"""

from __future__ import annotations

from typing import Any

from ..score.metrics import base_metric
from . import _words as words
from ._read import RunFiles
from ._words import Limits, mapping, number, rows, text

_RESULTS = ("PASS", "FAIL", words.NOT_MEASURED)

_NO_EVALUATION = "No evaluation is in this run: nothing is known yet about how good the model is."


def verdict_view(run: RunFiles, limits: Limits) -> dict[str, Any]:
    """The verdict, one or two sentences, three figures, the recommendation, the gates."""
    evaluation = run.evaluation
    gates = [_gate(gate, limits) for gate in rows(mapping(evaluation).get("gates"))]
    verdict, notes = _settle(evaluation, gates)
    main = main_comparison(run)
    recommendation = mapping(mapping(evaluation).get("recommendation"))
    return {
        "verdict": verdict,
        "sentences": _sentences(run, main) if evaluation is not None else [_NO_EVALUATION],
        "figures": _figures(run, main) if main else [],
        "gates": gates[: limits.entries],
        "gates_left_out": max(0, len(gates) - limits.entries),
        "recommendation": words.advice(str(recommendation["candidate"]), examples_chosen(run)) if recommendation.get("candidate") else None,
        "reason": words.excerpt(words.humane(recommendation.get("reason")), limits.text),
        "unadvised": _unadvised(recommendation, limits),
        "notes": notes,
    }


def _unadvised(recommendation: dict[str, Any], limits: Limits) -> str:
    """Why no candidate is recommended."""
    why = words.humane(recommendation.get("reason")).removeprefix(f"{words.NOT_MEASURED}: ")
    return f"No candidate is recommended: {text(why, limits.text)}" if why else "No candidate is recommended, since none was evaluated."


def _gate(gate: dict[str, Any], limits: Limits) -> dict[str, Any]:
    result = gate.get("result") if gate.get("result") in _RESULTS else words.NOT_MEASURED
    return {
        "name": text(words.humane(gate.get("name")), 3 * limits.names) or "unnamed gate",
        "result": result,
        "reason": words.excerpt(words.humane(gate.get("reason")), limits.text),
    }


def _settle(evaluation: dict[str, Any] | None, gates: list[dict[str, Any]]) -> tuple[str, list[str]]:
    """The verdict to show. What was not measured never helps: PASS needs at least one gate, and every gate passed."""
    stated = mapping(evaluation).get("verdict")
    if evaluation is None or stated not in _RESULTS:
        return words.NOT_MEASURED, []
    results = {gate["result"] for gate in gates}
    if stated != "PASS" or results == {"PASS"}:
        return stated, []
    shown = "FAIL" if "FAIL" in results else words.NOT_MEASURED
    why = "it has no gates" if not gates else "its gates did not all pass"
    return shown, [f"evaluation.json says PASS, but {why}; this page shows {shown}."]


def main_metric(run: RunFiles) -> str | None:
    """The metric that the verdict is about: the first gate's on the task, else the task's first, else the first that was compared."""
    for gate in rows(mapping(run.recipe.get("evaluate")).get("gates")):
        if gate.get("task", "task") == "task" and isinstance(gate.get("metric"), str):
            return gate["metric"]
    named = mapping(run.recipe.get("task")).get("metrics")
    if isinstance(named, list) and named and isinstance(named[0], str):
        return named[0]
    compared = [row["metric"] for row in rows(mapping(run.evaluation).get("comparisons")) if isinstance(row.get("metric"), str)]
    return compared[0] if compared else None


def main_comparison(run: RunFiles) -> dict[str, Any] | None:
    """The comparison that the verdict turns on: the first gate's own, else tuned against the strongest simpler candidate."""
    wanted, compared = main_metric(run), rows(mapping(run.evaluation).get("comparisons"))
    compared = [row for row in compared if all(isinstance(row.get(key), str) for key in ("task", "metric", "candidate", "baseline"))]
    for gate in rows(mapping(run.recipe.get("evaluate")).get("gates")):
        baseline = gate.get("better_than") or gate.get("not_worse_than")
        key = (gate.get("task", "task"), gate.get("metric"), gate.get("candidate", "tuned"), baseline)
        for row in compared:
            if key == (row["task"], row["metric"], row["candidate"], row["baseline"]):
                return row
    for baseline in ("few_shot", "zero_shot"):
        for row in compared:
            if row["candidate"] == "tuned" and row["baseline"] == baseline and row["task"] == "task" and row["metric"] == wanted:
                return row
    return next((row for row in compared if row["candidate"] == "tuned"), compared[0] if compared else None)


def measured(run: RunFiles, task: str, candidate: str, metric: str) -> dict[str, float | None]:
    """value, low, high and n of one number, each None where it was not measured."""
    entry: Any = mapping(run.evaluation).get("tasks")
    for key in (task, "candidates", candidate, "metrics", metric):
        entry = mapping(entry).get(key)
    return {key: number(mapping(entry).get(key)) for key in ("value", "low", "high", "n")}


def few_shot_part(run: RunFiles) -> dict[str, Any]:
    """evaluation.json's account of how few_shot's examples were chosen, wherever it lies; empty if there is none."""
    evaluation = mapping(run.evaluation)
    return mapping(evaluation.get("few_shot")) or mapping(mapping(mapping(evaluation.get("tasks")).get("task")).get("few_shot"))


def examples_chosen(run: RunFiles) -> int | None:
    """few_shot's number of examples, if the file says it."""
    part = few_shot_part(run)
    chosen = number((mapping(part.get("selected")) or part).get("k"))
    return None if chosen is None else int(chosen)


def confidence_words(run: RunFiles) -> str:
    """`95% interval`, by the recipe's level; plain `interval` where the level is not known."""
    level = number(mapping(run.evaluation).get("confidence")) or number(mapping(run.recipe.get("evaluate")).get("confidence"))
    return f"{100 * level:g}% interval" if level is not None else "interval"


def difference_unit(metric: str) -> tuple[int, str, int]:
    """Factor, unit and digits of a difference: points for a share, percent for perplexity (candidate / baseline - 1), else as it is."""
    if words.metric_of(metric).share:
        return 100, " points", 1
    return (100, "%", 1) if base_metric(metric) == "perplexity" else (1, "", 2)


def difference_words(metric: str, difference: float | None, low: float | None, high: float | None) -> tuple[str, str]:
    """A paired difference and its interval: (`+62.0 points`, `54.0 to 70.0`)."""
    if difference is None:
        return words.NOT_MEASURED, ""
    factor, unit, digits = difference_unit(metric)
    shown = words.signed(factor * difference, digits) + unit
    if low is None or high is None:
        return shown, f"interval {words.NOT_MEASURED}"
    return shown, f"{words.signed(factor * low, digits)} to {words.signed(factor * high, digits)}"


def _sentences(run: RunFiles, main: dict[str, Any] | None) -> list[str]:
    if main is None:
        return ["No two candidates were compared, so nothing is known about what the tuning changed."]
    metric, ours, theirs = main["metric"], main["candidate"], main["baseline"]
    a, b = (measured(run, main["task"], name, metric) for name in (ours, theirs))
    examples = examples_chosen(run)
    subject, other = words.capital(words.candidate_words(ours, examples)), words.candidate_words(theirs, examples)
    if a["value"] is None or b["value"] is None:
        return [f"{words.metric_of(metric).label} of {words.candidate_words(ours, examples)} and {other}: {words.NOT_MEASURED}."]
    digits = 1 if abs(a["value"] - b["value"]) < 0.02 else 0
    values = [words.value_words(metric, side["value"], digits) for side in (a, b)]
    n = words.count(a["n"])
    pattern = words.metric_of(metric).sentence
    if pattern:
        first = f"{subject} {pattern.format(value=values[0], n=n)}; {other}, {values[1]}."
    else:
        on = "" if main["task"] == "task" else f" on the set {text(main['task'], 80)}"
        first = f"{subject} has {words.metric_of(metric).label} {values[0]}{on} over {n} items; {other}, {values[1]}."
    return [first, _difference_sentence(run, main, digits)]


def _difference_sentence(run: RunFiles, main: dict[str, Any], digits: int) -> str:
    difference, low, high, seen = (number(main.get(key)) for key in ("difference", "low", "high", "minimum_detectable"))
    if difference is None:
        return f"The difference: {words.NOT_MEASURED}."
    factor, unit, usual = difference_unit(main["metric"])
    digits = digits if unit == " points" else usual
    shown = [None if value is None else words.signed(factor * value, digits).removeprefix("+") for value in (difference, low, high, seen)]
    if low is None or high is None:
        return f"The difference is {shown[0]}{unit}; its interval: {words.NOT_MEASURED}, so it may be chance."
    said = f"The difference is {shown[0]}{unit} ({confidence_words(run)} {shown[1]} to {shown[2]})"
    if low > 0 or high < 0:
        return f"{said}; chance alone would hardly give that."
    power = f" With this many items a true difference below {shown[3]}{unit} would probably go unseen." if seen is not None else ""
    return f"{said}; the interval includes zero, so it may be chance.{power}"


def _figures(run: RunFiles, main: dict[str, Any]) -> list[dict[str, str]]:
    metric, figures = main["metric"], []
    for name in (main["candidate"], main["baseline"]):
        got = measured(run, main["task"], name, metric)
        figures.append(
            {
                "label": words.candidate_label(name),
                "value": words.value_words(metric, got["value"]),
                "note": f"{words.span(metric, got['low'], got['high'])}, n {words.count(got['n'])}",
                "accent": name.startswith("tuned"),
            }
        )
    difference, interval = difference_words(metric, *(number(main.get(key)) for key in ("difference", "low", "high")))
    got = measured(run, main["task"], main["candidate"], metric)
    figures.append({"label": "Difference", "value": difference, "note": f"{interval}, n {words.count(got['n'])}", "accent": False})
    return figures
