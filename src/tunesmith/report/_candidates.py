"""Candidates side by side: one table and one interval chart per main metric for each task, the paired differences, few_shot's choice.

Takes `RunFiles`; gives a dictionary for templates/candidates.html. Every number has its interval and n; a missing one says so.
"""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from . import _words as words
from ._learning import part_seconds
from ._read import RunFiles
from ._rollouts import reward_model_words
from ._verdict import difference_words, few_shot_part, main_metric, measured
from ._words import Limits, mapping, number, rows, text
from .charts import Interval, interval_chart

_MOST_NOTES = 10
# Beyond this many charts for one task a reader compares nothing; the table holds the rest.
_MOST_CHARTS = 6


def candidates_view(run: RunFiles, limits: Limits) -> dict[str, Any]:
    """One entry per task, the comparisons, and the trials by which a candidate's settings were chosen on validation rows."""
    evaluation = mapping(run.evaluation)
    tasks = mapping(evaluation.get("tasks"))
    notes = evaluation.get("notes")
    notes = notes if isinstance(notes, list) else []
    more = [f"and {len(notes) - _MOST_NOTES} more, in evaluation.json"] if len(notes) > _MOST_NOTES else []
    compared = rows(evaluation.get("comparisons"))
    parts = {
        "How the few-shot examples were chosen": few_shot_part(run),
        "How the classical candidate was fitted": mapping(evaluation.get("classical")),
    }
    return {
        "tasks": [_task(run, name, mapping(task), limits) for name, task in list(tasks.items())[:8]],
        "comparisons": [part for part in _comparisons(run, compared[: limits.entries]) if part],
        "comparisons_left_out": max(0, len(compared) - limits.entries),
        "choices": [_choice(title, part, limits) for title, part in parts.items() if part],
        "notes": [text(note, limits.text) for note in notes[:_MOST_NOTES]] + more,
    }


def _task(run: RunFiles, name: str, task: dict[str, Any], limits: Limits) -> dict[str, Any]:
    entries = mapping(task.get("candidates"))
    names = [candidate for candidate in entries][: limits.candidates]
    metrics = _metrics(run, name, [mapping(mapping(entries[candidate]).get("metrics")) for candidate in names])
    whole = [metric for metric in metrics if "." not in metric][: limits.metrics]
    parts = [metric for metric in metrics if "." in metric][: limits.metrics]
    return {
        "title": "The task" if name == "task" else "The guard against forgetting" if name == "general" else words.readable(name),
        "name": text(name, limits.names),
        "n": words.count(task.get("n")),
        "skipped": [(text(reason, 120), words.count(many)) for reason, many in list(mapping(task.get("skipped")).items())[:10]],
        "hash": text(task.get("hash"), 17),
        "tables": [_table(run, name, part, {one: mapping(entries[one]) for one in names}) for part in (whole, parts) if part],
        "reward_models": [
            (words.candidate_label(one), reward_model_words(mapping(mapping(entries[one]).get("reward_model"))))
            for one in names
            if mapping(entries[one]).get("reward_model")
        ],
        "charts": [_chart(run, name, metric, names) for metric in whole[:_MOST_CHARTS]],
        "missing": _missing(run, name, task, entries)[: limits.candidates],
        "left_out": len(entries) - len(names) + len(metrics) - len(whole) - len(parts),
    }


def _missing(run: RunFiles, name: str, task: dict[str, Any], entries: dict[str, Any]) -> list[tuple[str, str]]:
    """Candidates without any number, each with the reason."""
    reasons = mapping(task.get("not_measured"))
    wanted = mapping(run.recipe.get("evaluate")).get("candidates")
    named = [str(candidate) for candidate in wanted] if isinstance(wanted, list) and name == "task" else []
    absent = [candidate for candidate in dict.fromkeys([*reasons, *named]) if candidate not in entries]
    return [
        (words.candidate_label(candidate), text(reasons.get(candidate) or "named in the recipe, but not evaluated", 200))
        for candidate in absent
    ]


def _metrics(run: RunFiles, task: str, measured_in: list[dict[str, Any]]) -> list[str]:
    """Every metric of the task: the verdict's first, then the recipe's order, then the rest as they come."""
    found = list(dict.fromkeys(metric for metrics in measured_in for metric in metrics))
    if task != "task":
        return found
    named = mapping(run.recipe.get("task")).get("metrics")
    first = [main_metric(run), *(named if isinstance(named, list) else []), "perplexity"]
    return [*dict.fromkeys(metric for metric in first if metric in found), *(metric for metric in found if metric not in first)]


def _table(run: RunFiles, task: str, metrics: list[str], entries: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {
        "metrics": [_metric_head(metric) for metric in metrics],
        "rows": [_row(run, task, candidate, entry, metrics) for candidate, entry in entries.items()],
    }


def _metric_head(metric: str) -> dict[str, Any]:
    return {"label": text(words.metric_of(metric).label, 60), "lower": words.lower_is_better(metric)}


def _row(run: RunFiles, task: str, candidate: str, entry: dict[str, Any], metrics: list[str]) -> dict[str, Any]:
    seconds, tokens = number(entry.get("seconds")), number(entry.get("mean_output_tokens"))
    seconds = part_seconds(run, f"{task}.{candidate}") if seconds is None else seconds
    return {
        "label": words.candidate_label(candidate),
        "words": words.CANDIDATES.get(candidate, ("", ""))[1],
        "tuned": candidate.startswith("tuned"),
        "cells": [_cell(metric, measured(run, task, candidate, metric), mapping(entry.get("not_measured"))) for metric in metrics],
        "decoding": text(entry.get("decoding"), 60),
        "compares": text(entry.get("compares"), 120),
        "seconds": words.duration(seconds),
        "tokens": "" if not entry.get("decoding") else words.NOT_MEASURED if tokens is None else f"{tokens:.1f} tokens",
    }


def _cell(metric: str, got: dict[str, float | None], reasons: dict[str, Any]) -> dict[str, Any]:
    known = got["value"] is not None
    return {
        "value": words.value_words(metric, got["value"]),
        "known": known,
        "why": "" if known else text(reasons.get(metric), 100),
        "interval": words.span(metric, got["low"], got["high"]) if known else "",
        "n": words.count(got["n"]) if known else "",
    }


def _chart(run: RunFiles, task: str, metric: str, names: list[str]) -> dict[str, Any]:
    known, intervals = words.metric_of(metric), []
    for candidate in names:
        got = measured(run, task, candidate, metric)
        value = words.value_words(metric, got["value"])
        note = value if got["value"] is None else f"{value} ({words.span(metric, got['low'], got['high'])}), n {words.count(got['n'])}"
        intervals.append(
            Interval(words.candidate_label(candidate), got["value"], got["low"], got["high"], note, candidate.startswith("tuned"))
        )
    svg: Markup = interval_chart(intervals, name=text(known.label, 60), share=known.share)
    return {"title": text(known.label, 60), "lower": words.lower_is_better(metric), "svg": svg}


def _comparisons(run: RunFiles, compared: list[dict[str, Any]]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(differences in whole metrics, differences by field)."""
    by_field = ["." in str(row.get("metric")) for row in compared]
    shown = [_comparison(run, row) for row in compared]
    return [row for row, part in zip(shown, by_field, strict=True) if not part], [
        row for row, part in zip(shown, by_field, strict=True) if part
    ]


def _comparison(run: RunFiles, row: dict[str, Any]) -> dict[str, str]:
    metric, task = str(row.get("metric")), str(row.get("task"))
    n = number(row.get("n")) or measured(run, task, str(row.get("candidate")), metric)["n"]
    difference, low, high, seen = (number(row.get(key)) for key in ("difference", "low", "high", "minimum_detectable"))
    shown, interval = difference_words(metric, difference, low, high)
    smallest = difference_words(metric, seen, None, None)[0].removeprefix("+")
    return {
        "task": text(task, 80),
        "n": words.count(n),
        "metric": text(words.metric_of(metric).label, 60),
        "pair": f"{words.candidate_label(str(row.get('candidate')))} against {words.candidate_label(str(row.get('baseline')))}",
        "difference": shown,
        "interval": interval or words.NOT_MEASURED,
        "smallest": smallest,
        "reading": _reading(metric, low, high),
    }


def _reading(metric: str, low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return words.NOT_MEASURED
    if low <= 0 <= high:
        return "no clear difference"
    return "worse" if (low > 0) == words.lower_is_better(metric) else "better"


def _choice(title: str, part: dict[str, Any], limits: Limits) -> dict[str, Any]:
    """The trials on validation rows as they stand in the file, whatever their columns."""
    trials = rows(part.get("table")) or rows(part.get("trials"))
    columns = list(dict.fromkeys(key for trial in trials for key in trial))[:8]
    chosen = mapping(part.get("selected")) or {key: value for key, value in part.items() if not isinstance(value, (dict, list))}
    return {
        "title": title,
        "chosen": [(words.readable(key), _plain_value(key, chosen)) for key in list(chosen)[:12]],
        "columns": [words.readable(column) for column in columns],
        "rows": [[_plain_value(column, trial) for column in columns] for trial in trials[: limits.entries]],
        "left_out": max(0, len(trials) - limits.entries),
    }


def _plain_value(key: str, trial: dict[str, Any]) -> str:
    """One entry of a trial; a value is written in the unit of the trial's own metric."""
    value = trial.get(key)
    as_float = number(value)
    if value is None:
        return words.NOT_MEASURED
    if as_float is None:
        return text(", ".join(str(item) for item in value) if isinstance(value, list) else value, 60)
    metric = key if key in words.METRICS else str(trial.get("metric")) if key == "value" else ""
    return words.value_words(metric, as_float) if metric else f"{as_float:g}"
