"""Twelve example outputs, base beside tuned on the same items: wins, losses and ties.

Takes `RunFiles`; gives a dictionary for templates/examples.html. Only where a metric is right or wrong are two answers both right or both
wrong; of a graded one two answers differ or not. The choice is a pure function of the samples (the order of a
hash of item_id), so nobody picks the good ones; fields are marked right or wrong by the scores that the evaluation wrote.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from . import _words as words
from ._read import RunFiles
from ._verdict import main_comparison, main_metric
from ._words import Excerpt, Limits, excerpt, mapping, number, rows, text

WANTED = 12
_QUOTA = (("win", 4), ("loss", 4), ("both_wrong", 2), ("both_right", 2), ("same", 4))
_OUTCOMES = {
    "win": ("Win", "the tuned model is better"),
    "loss": ("Loss", "the base is better"),
    "both_right": ("Both right", "no difference"),
    "both_wrong": ("Both wrong", "no difference"),
    "same": ("No difference", "no difference"),
}
_GRADED = {"win": ("Better", "the tuned model is better"), "loss": ("Worse", "the base is better")}
_RIGHT = 1.0  # of an item's score, where a score is right or wrong
_RIGHT_OR_WRONG = frozenset({"exact_match", "accuracy", "json_validity"})
_MOST_FIELDS = 12


def examples_view(run: RunFiles, limits: Limits) -> dict[str, Any]:
    """The chosen examples, how many items there are of each outcome, and which two candidates are shown."""
    tuned, base = _pair(run)
    metric = main_metric(run) or "exact_match"
    ours = _by_item(run.samples("task", tuned))
    theirs = _by_item(run.samples("task", base)) if base else {}
    shared = [item for item in ours if item in theirs and any(isinstance(one[item].get("output"), str) for one in (ours, theirs))]
    found = {item: _outcome(ours[item], theirs[item], metric) for item in shared}
    outcomes = {item: outcome for item, outcome in found.items() if outcome is not None}
    return {
        "tuned": words.candidate_label(tuned),
        "base": words.candidate_label(base) if base else None,
        "metric": words.metric_of(metric).label,
        "counts": [(_words_of(kind, metric)[0], list(outcomes.values()).count(kind)) for kind in _kinds(metric)],
        "unscored": len(found) - len(outcomes),
        "n": len(shared),
        "examples": [_example(outcomes[item], ours[item], theirs[item], metric, limits) for item in choose(outcomes)],
    }


def choose(outcomes: dict[str, str]) -> list[str]:
    """Twelve item ids: up to 4 wins, 4 losses and 4 without a difference (2 both wrong, 2 both right), then whatever fills the twelve, by
    hash of the id.

    >>> choose({"a": "win", "b": "loss"})
    ['a', 'b']
    """
    order = sorted(outcomes, key=lambda item: hashlib.sha256(item.encode("utf-8", "surrogatepass")).hexdigest())
    chosen: list[str] = []
    for kind, quota in _QUOTA:
        chosen += [item for item in order if outcomes[item] == kind][:quota]
    for kind in ("both_wrong", "both_right", "same", "loss", "win"):
        chosen += [item for item in order if outcomes[item] == kind and item not in chosen][: WANTED - len(chosen)]
    rank = {kind: position for position, (kind, _) in enumerate(_QUOTA)}
    return sorted(chosen, key=lambda item: rank[outcomes[item]])


def _pair(run: RunFiles) -> tuple[str, str | None]:
    """The tuned candidate and the base shown beside it: the verdict's own baseline where it has samples, else the other one."""
    main = main_comparison(run) or {}
    tuned = str(main.get("candidate", "tuned"))
    for base in (str(main.get("baseline", "few_shot")), "few_shot", "zero_shot"):
        if run.samples("task", base):
            return tuned, base
    return tuned, None


def _by_item(samples: list[dict[str, Any]] | None) -> dict[str, dict[str, Any]]:
    return {str(sample["item_id"]): sample for sample in samples or [] if sample.get("item_id") is not None}


def _outcome(ours: dict[str, Any], theirs: dict[str, Any], metric: str) -> str | None:
    a, b = (number(mapping(sample.get("scores")).get(metric)) for sample in (ours, theirs))
    if a is None or b is None:
        return None
    if a != b:
        return "win" if (a < b) == words.lower_is_better(metric) else "loss"
    if not _is_right_or_wrong(metric):
        return "same"
    return "both_right" if a >= _RIGHT else "both_wrong"


def _is_right_or_wrong(metric: str) -> bool:
    """Whether an item's score is 0 or 1. A part of a graded metric, a field's accuracy say, is not taken to be."""
    return metric.partition(".")[0] in _RIGHT_OR_WRONG


def _kinds(metric: str) -> tuple[str, ...]:
    return ("win", "loss", "both_wrong", "both_right") if _is_right_or_wrong(metric) else ("win", "loss", "same")


def _words_of(kind: str, metric: str) -> tuple[str, str]:
    return _OUTCOMES[kind] if _is_right_or_wrong(metric) else _GRADED.get(kind, _OUTCOMES[kind])


def _example(outcome: str, ours: dict[str, Any], theirs: dict[str, Any], metric: str, limits: Limits) -> dict[str, Any]:
    turns = [message for message in rows(ours.get("prompt")) if message.get("role") != "system"]
    asked = next((message.get("content") for message in reversed(turns) if message.get("role") == "user"), None)
    title, meaning = _words_of(outcome, metric)
    reference = _fields(ours.get("reference"))
    return {
        "kind": outcome,
        "title": title,
        "meaning": meaning,
        "item": text(ours.get("item_id"), 60),
        "asked": excerpt(_content(asked), limits.text),
        "teaser": " ".join(text(_content(asked)[:400]).split())[:110],
        "earlier": max(0, len(turns) - 1),
        "fields": _field_rows(reference, ours, theirs, limits) if reference else [_whole(ours, theirs, metric, limits)],
        "answers": [_answer(sample, reference is not None, limits) for sample in (theirs, ours)],
    }


def _content(content: Any) -> str:
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in rows(content))
    return content if isinstance(content, str) else ""


def _fields(output: Any) -> dict[str, Any] | None:
    """An answer's fields if it is a JSON object, else None."""
    try:
        value = json.loads(output) if isinstance(output, str) else output
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and value else None


def _field_rows(reference: dict[str, Any], ours: dict[str, Any], theirs: dict[str, Any], limits: Limits) -> list[dict[str, Any]]:
    answers = [_fields(sample.get("output")) for sample in (theirs, ours)]
    extra = [name for answer in answers for name in answer or {} if name not in reference]
    table = []
    for name in [*reference, *dict.fromkeys(extra)][:_MOST_FIELDS]:
        cells = [_cell(name, answer, reference, sample, limits) for answer, sample in zip(answers, (theirs, ours), strict=True)]
        there = name in reference
        wanted = excerpt(_shown(reference[name]), limits.text) if there else Excerpt("not in the reference", 0)
        table.append({"name": text(name, limits.names), "reference": wanted, "there": there, "cells": cells})
    return table


def _cell(name: str, answer: dict[str, Any] | None, reference: dict[str, Any], sample: dict[str, Any], limits: Limits) -> dict[str, Any]:
    """One field of one answer; mark: right, wrong, close (a free text, with its ROUGE-L) or none."""
    if answer is None or name not in answer:
        return {
            "text": Excerpt("missing" if name in reference else "not given", 0),
            "mark": "wrong" if name in reference else "none",
            "note": "",
        }
    shown = excerpt(_shown(answer[name]), limits.text)
    scores = mapping(sample.get("scores"))
    score = number(scores.get(f"field_accuracy.{name}"))
    if name not in reference:
        return {"text": shown, "mark": "wrong", "note": ""}
    if score is None and answer[name] != reference[name] and number(scores.get("rougeL")) is not None:
        return {"text": shown, "mark": "close", "note": f"ROUGE-L {scores['rougeL']:.2f}"}
    right = score >= _RIGHT if score is not None else answer[name] == reference[name]
    return {"text": shown, "mark": "right" if right else "wrong", "note": ""}


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _whole(ours: dict[str, Any], theirs: dict[str, Any], metric: str, limits: Limits) -> dict[str, Any]:
    """The one row of a task whose answers are no JSON objects."""
    cells = [{"text": excerpt(sample.get("output"), limits.text), **_marked(sample, metric)} for sample in (theirs, ours)]
    there = isinstance(ours.get("reference"), str)
    reference = excerpt(ours["reference"], limits.text) if there else Excerpt("none", 0)
    return {"name": "answer", "reference": reference, "there": there, "cells": cells}


def _marked(sample: dict[str, Any], metric: str) -> dict[str, str]:
    """How an answer did: right or wrong, or by what number; where there is none, that."""
    score = number(mapping(sample.get("scores")).get(metric))
    if score is None:
        return {"mark": "none", "note": "no score"}
    if _is_right_or_wrong(metric):
        return {"mark": "right" if score >= _RIGHT else "wrong", "note": ""}
    return {"mark": "close", "note": f"{words.metric_of(metric).label} {words.value_words(metric, score)}"}


def _answer(sample: dict[str, Any], structured: bool, limits: Limits) -> dict[str, Any]:
    """What the fields do not show: an output that is no JSON object, or that the token limit cut."""
    broken = structured and _fields(sample.get("output")) is None
    return {"broken": excerpt(sample.get("output"), limits.text) if broken else None, "cut_off": sample.get("finish_reason") == "length"}
