"""What went on while a stage learned from its own answers: stops, answers without a score, hacking, and answers early and late.

Takes a stage's events and its part of the recipe; gives sentences and the table of samples for templates/learning.html, and findings for
templates/findings.html.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import _words as words
from ._curves import known, series
from ._words import Limits, excerpt, mapping, number, rows, text

_MOST_EVALUATIONS = 8
# A rise or fall that is less than this share of the measure's mean deviation is not spoken of.
_SPOKEN_OF = 0.25

Events = Sequence[Mapping[str, Any]]


def stop_sentences(events: Events, stage: Mapping[str, Any]) -> list[str]:
    """One sentence for each time that the stage was stopped before its last step, by a rule or for want of gain."""
    stops = [event for event in events if event.get("event") == "stopped"]
    if stops:
        return [_stop_words(stops[-1])]
    for event in events:
        if event.get("event") == "stage_finished" and event.get("stopped_early") is True:
            patience = number(stage.get("early_stopping_patience"))
            why = f"{words.count(patience)} evaluations brought" if patience is not None else "the evaluations brought"
            return [f"Stopped early, at step {words.count(event.get('step'))}: {why} no better held-out result."]
    return []


def _stop_words(event: Mapping[str, Any]) -> str:
    rule, value, limit = str(event.get("rule")), number(event.get("value")), number(event.get("limit"))
    where = f"Stopped after step {words.count(event.get('step'))} by the rule watch.{text(rule, 40)}"
    if value is None or limit is None:
        return f"{where}."
    said, bound = words.plain(value), words.plain(limit)
    return {
        "max_kl": f"{where}: the policy was {said} nats a sequence from its reference, over the limit of {bound}.",
        "max_length_ratio": f"{where}: answers had become {said} times as long as the first ones, over the limit of {bound}.",
        "min_distinct_ratio": f"{where}: prompts got answers of their own {value:.2g} times as often as at first, under {limit:.2g}.",
        "min_entropy": f"{where}: the entropy had fallen to {said} nats a token, under the limit of {bound}.",
    }.get(rule, f"{where}: the value was {said}, the limit {bound}.")


def counts_sentence(events: Events, stage: Mapping[str, Any]) -> str:
    """How many answers had no score and how many groups no spread, over the rollouts that were logged; empty where nothing was counted."""
    last = {number(event.get("iteration")): event for event in events if number(event.get("iteration")) is not None}
    if not last:
        return ""
    prompts = number(mapping(stage.get("rollout")).get("prompts_per_step"))
    said = []
    for key, what, whole in (
        ("unscorable", "answers could not be scored and carried no advantage", None),
        ("groups_without_spread", "groups had no spread, so that nothing could be learned from them", prompts),
        ("sampled_again", "answers were sampled besides, to replace groups without spread", None),
    ):
        values = [value for value in (number(event.get(key)) for event in last.values()) if value is not None]
        if values and (sum(values) or key != "sampled_again"):
            of = f" of {words.count(whole * len(last))}" if whole else ""
            said.append(f"{words.count(sum(values))}{of} {what}")
    return f"In {words.count(len(last))} logged rollouts: {'; '.join(said)}." if said else ""


def hacking_sentence(events: Events) -> str:
    """Says that the reward rose while the gold measure fell: what reward hacking looks like in numbers. Empty where it did not.

    No interval is taken, so the sentence names how many measurements it rests on and says that the reward may be hacked.
    """
    for prefix, where in (("eval_", "on prompts not trained on in this stage"), ("", "on sampled answers")):
        proxy, gold = known(series(events, f"{prefix}reward")), known(series(events, f"{prefix}gold_reward"))
        if len(proxy) < 2 or len(gold) < 2:
            continue
        (rose_from, rose_to), (fell_from, fell_to) = _first_and_last(proxy), _first_and_last(gold)
        if rose_to - rose_from > _noise(proxy) and fell_from - fell_to > _noise(gold):
            return (
                f"The reward rose from {words.plain(rose_from)} to {words.plain(rose_to)} {where} while the gold measure fell from "
                f"{words.plain(fell_from)} to {words.plain(fell_to)} (means of the first and the last fifth, "
                f"n {len(proxy)} and {len(gold)} measurements): the reward may be hacked."
            )
        return ""
    return ""


def _first_and_last(points: list[tuple[float, float]]) -> tuple[float, float]:
    """The means of the first and the last fifth."""
    size, values = max(1, len(points) // 5), [value for _, value in points]
    return sum(values[:size]) / size, sum(values[-size:]) / size


def _noise(points: list[tuple[float, float]]) -> float:
    values = [value for _, value in points]
    mean = sum(values) / len(values)
    return _SPOKEN_OF * sum(abs(value - mean) for value in values) / len(values)


def samples_view(events: Events, limits: Limits) -> dict[str, Any] | None:
    """The same prompts' answers at the first and at the last evaluation, side by side, and those between; None where there are none."""
    by_step = {float(event["step"]): rows(event.get("samples")) for event in events if event.get("event") == "evaluated"}
    found = sorted((step, samples) for step, samples in by_step.items() if samples)
    if not found:
        return None
    ends = found[:1] if len(found) == 1 else [found[0], found[-1]]
    between = found[1:-1]
    kept = (
        between if len(between) <= _MOST_EVALUATIONS else [between[i * len(between) // _MOST_EVALUATIONS] for i in range(_MOST_EVALUATIONS)]
    )
    return {
        "steps": [words.count(step) for step, _ in ends],
        "rows": _side_by_side([samples for _, samples in ends], limits),
        "between": [{"step": words.count(step), "rows": _side_by_side([samples], limits)} for step, samples in kept],
        "left_out": len(between) - len(kept),
    }


def _side_by_side(columns: list[list[dict[str, Any]]], limits: Limits) -> list[dict[str, Any]]:
    prompts = list(dict.fromkeys(str(sample.get("prompt")) for samples in columns for sample in samples))
    answers = [{str(sample.get("prompt")): sample for sample in samples} for samples in columns]
    return [
        {"prompt": excerpt(prompt, limits.text // 2), "cells": [_answer(found.get(prompt), limits) for found in answers]}
        for prompt in prompts[:_MOST_EVALUATIONS]
    ]


def _answer(sample: dict[str, Any] | None, limits: Limits) -> dict[str, Any]:
    if sample is None:
        return {"text": excerpt("", 1), "asked": False, "reward": ""}
    reward = number(sample.get("reward"))
    return {
        "text": excerpt(sample.get("answer"), limits.text),
        "asked": True,
        "reward": "no score" if reward is None else words.plain(reward),
    }


def training_findings(name: str, events: Events, stage: Mapping[str, Any]) -> list[dict[str, str]]:
    """What a reader should know of a stage before trusting its result: {title, evidence, mend}."""
    shown = text(name, 80)
    found = [
        {"title": f"Stage {shown} was stopped before its end", "evidence": sentence, "mend": _STOP_MEND}
        for sentence in stop_sentences(events, stage)
        if "watch." in sentence
    ]
    hacked = hacking_sentence(events)
    if hacked:
        found.append({"title": f"Stage {shown} may hack its reward", "evidence": hacked, "mend": _HACK_MEND})
    lost = sum(value or 0 for _, value in series(events, "unscorable"))
    if lost:
        mend = "look at the reward function: it gave no number for these answers"
        found.append({"title": f"Answers without a score in stage {shown}", "evidence": counts_sentence(events, stage), "mend": mend})
    dull = _dull_share(events, stage)
    if dull is not None and dull > 0.5:
        evidence = f"In {100 * dull:.0f}% of the groups every answer got the same reward."
        mend = "take prompts of middling difficulty or a reward with steps between, raise num_generations, or set dynamic_sampling"
        found.append({"title": f"Stage {shown} had little to learn from", "evidence": evidence, "mend": mend})
    return found


_STOP_MEND = "read the samples and curves of the stage; lower learning_rate, raise kl_coef or beta, or move the limit"
_HACK_MEND = "stop earlier, raise kl_coef, take an ensemble of reward models with ensemble: min, or mend the reward"


def _dull_share(events: Events, stage: Mapping[str, Any]) -> float | None:
    prompts = number(mapping(stage.get("rollout")).get("prompts_per_step"))
    last = {number(event.get("iteration")): number(event.get("groups_without_spread")) for event in events if "iteration" in event}
    values = [value for value in last.values() if value is not None]
    return sum(values) / (prompts * len(values)) if prompts and values else None


def reward_model_words(found: dict[str, Any]) -> list[tuple[str, str]]:
    """What a reward model's scores depend on besides how good an answer is, as (what, how much)."""
    calibration, bias = mapping(found.get("calibration")), mapping(found.get("length_bias"))
    accuracy = mapping(found.get("accuracy"))
    shown = [("Accuracy on held-out pairs", _with_n(number(accuracy.get("value")), accuracy, share=True))] if accuracy else []
    shown += [("Expected calibration error", _with_n(number(calibration.get("expected_calibration_error")), calibration, share=True))]
    shown += [
        (f"Correlation of score and length ({name.capitalize()})", _with_n(number(bias.get(name)), bias))
        for name in ("pearson", "spearman")
    ]
    for side in ("shorter", "longer"):
        part = mapping(bias.get(f"accuracy_where_{side}_is_preferred"))
        shown.append((f"Accuracy where the {side} answer is preferred", _with_n(number(part.get("value")), part, share=True)))
    for part in rows(found.get("accuracy_by_place"))[:10]:
        shown.append((f"Accuracy of place {words.count(part.get('place'))}", _with_n(number(part.get("value")), part, share=True)))
    return shown


def _with_n(value: float | None, part: dict[str, Any], *, share: bool = False) -> str:
    if value is None:
        return words.NOT_MEASURED
    return f"{100 * value:.1f}%, n {words.count(part.get('n'))}" if share else f"{words.signed(value, 2)}, n {words.count(part.get('n'))}"
