"""The curves of a stage besides its loss: rewards, KL, entropy, lengths, margins, whatever its events hold, each with a caption in words.

Takes a stage's events and its part of the recipe; gives charts for templates/learning.html. A curve is shown where the events have one of
its series, so that a new objective's metrics appear without a change here only if they have a known name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import _words as words
from ._words import mapping, number, text
from .charts import Line, line_chart

Series = list[tuple[float, float | None]]
TRAIN, HELD, PAIR = "train", "validation", "rate"
# A small chart is some 300 pixels wide; more points are not seen.
_POINTS = 120
# A limit is drawn where it does not flatten the curve it stands over.
_LIMIT_IN_SIGHT = 3.0
_APART = 6


@dataclass(frozen=True)
class Curve:
    """One chart: its title, unit, lines as (label, key of the events, kind), and what it says in a sentence.

    beside: series that are said in the caption and not drawn. limit: the rule of the stage's `watch` that bounds the first line.
    """

    title: str
    unit: str
    lines: tuple[tuple[str, str, str], ...]
    meaning: str
    beside: tuple[tuple[str, str], ...] = ()
    limit: str | None = None
    say: Callable[[float], str] = words.plain


def _share(value: float) -> str:
    return f"{100 * value:.0f}%" if value >= 0.1 or value == 0 else f"{100 * value:.1f}%"


CURVES = (
    Curve(
        "Reward",
        "reward of an answer",
        (("sampled answers", "reward", TRAIN), ("prompts not trained on", "eval_reward", HELD)),
        "The mean of what the stage is trained to raise.",
    ),
    Curve(
        "Gold reward",
        "gold reward of an answer",
        (("sampled answers", "gold_reward", TRAIN), ("prompts not trained on", "eval_gold_reward", HELD)),
        "The measure that training never sees: read it beside the reward.",
    ),
    Curve(
        "Best of each group",
        "reward of an answer",
        (("best", "reward_best", PAIR), ("all", "reward", TRAIN)),
        "The answers that are trained on, and all that were sampled.",
    ),
    Curve(
        "KL to the reference",
        "nats a sequence",
        (("sampled answers", "kl", PAIR),),
        "How far the policy is from the model that it is compared with.",
        limit="max_kl",
    ),
    Curve(
        "Entropy",
        "nats a token",
        (("sampled answers", "entropy", PAIR),),
        "How open the next token is; near zero the policy says one thing only.",
        limit="min_entropy",
    ),
    Curve(
        "Answer length",
        "tokens",
        (("sampled answers", "length", TRAIN), ("prompts not trained on", "eval_length", HELD)),
        "A reward that likes length shows here first.",
        beside=(("ended by themselves", "finished"),),
        limit="max_length_ratio",
    ),
    Curve(
        "Distinct and repeated",
        "share",
        (("distinct answers", "distinct", PAIR), ("repeated 3-grams", "repetition", TRAIN)),
        "Answers of a step that differ from one another, and three tokens that an answer has had before.",
        say=_share,
    ),
    Curve(
        "Spread of the reward",
        "standard deviation",
        (("sampled answers", "reward_std", PAIR),),
        "Without spread there is nothing to prefer.",
    ),
    Curve(
        "Sampler against trainer",
        "absolute difference in log-probability",
        (("mean", "mismatch", PAIR), ("largest", "mismatch_max", TRAIN)),
        "What sampled and what is trained should be one model.",
    ),
    Curve(
        "Clipped",
        "share of tokens",
        (("policy", "clip_ratio/region_mean", PAIR), ("value", "value_clip_ratio", TRAIN)),
        "Tokens whose update was cut at the clip range.",
        say=_share,
    ),
    Curve("Value loss", "squared error", (("value", "loss/value", PAIR),), "How wrong the value head is about the return."),
    Curve("KL coefficient", "weight", (("coefficient", "kl_coef", PAIR),), "The weight of the KL, as it adapts."),
    Curve(
        "Implicit rewards",
        "reward",
        (("chosen", "rewards/chosen", PAIR), ("rejected", "rewards/rejected", TRAIN)),
        "The log-ratios to the reference (without one, the scores) of the two answers, times beta.",
    ),
    Curve(
        "Reward margin",
        "chosen less rejected",
        (("training", "rewards/margins", TRAIN), ("validation", "eval_rewards/margins", HELD)),
        "By how much the chosen answer is ahead.",
    ),
    Curve(
        "Pairs in the right order",
        "share of pairs",
        (("training", "rewards/accuracies", TRAIN), ("validation", "eval_rewards/accuracies", HELD)),
        "Half of them is chance.",
        say=_share,
    ),
    Curve(
        "Log-probability of the answers",
        "nats a sequence",
        (("chosen", "logps/chosen", PAIR), ("rejected", "logps/rejected", TRAIN)),
        "Where both fall, the chosen answers are made less likely too.",
    ),
    Curve(
        "Accuracy of the reward model",
        "share of pairs",
        (("training", "accuracy", TRAIN), ("validation", "eval_accuracy", HELD)),
        "Pairs whose better answer gets the higher score; half is chance.",
        say=_share,
    ),
    Curve(
        "Margin of the reward model",
        "better less worse",
        (("training", "margin", TRAIN), ("validation", "eval_margin", HELD)),
        "By how much the better answer is ahead.",
    ),
    Curve(
        "Mean score of the reward model",
        "score",
        (("training", "mean_reward", TRAIN), ("validation", "eval_mean_reward", HELD)),
        "Scores may drift together; only differences are learned.",
    ),
)


def series(events: Sequence[Mapping[str, Any]], key: str) -> Series:
    """The values of `key` by step; a value that is there but not finite is kept as None."""
    return sorted({float(event["step"]): number(event[key]) for event in events if key in event}.items())


def known(points: Series) -> list[tuple[float, float]]:
    """The points that have a finite value."""
    return [(step, value) for step, value in points if value is not None]


def curves_view(name: str, events: Sequence[Mapping[str, Any]], stage: Mapping[str, Any], marks: Sequence[tuple[float, str]]) -> list[dict]:
    """The charts of one stage in the order in which they are read: {title, key, svg, caption}."""
    shown = []
    for curve in (*CURVES, *_own_curves(events)):
        found = [(label, series(events, key), kind) for label, key, kind in curve.lines]
        if not any(known(points) for _, points, _ in found) or _is_dull(curve, found):
            continue
        shown.append(_chart(name, curve, found, events, stage, marks))
    return shown


def _own_curves(events: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """A curve for each of several rewards, and for each term of the loss, by the names that the events give them."""
    keys = dict.fromkeys(key for event in events for key in event if isinstance(key, str))
    rewards = [key for key in keys if key.startswith("reward/")][:_APART]
    terms = [key for key in keys if key.startswith("loss/") and key != "loss/value"][:_APART]
    found = []
    for key in rewards:
        own = text(key.removeprefix("reward/"), 40)
        if own == "disagreement":
            meaning = "The standard deviation of the reward models' scores of one answer: high where none of them knows."
            found.append(Curve("Disagreement of the reward models", "standard deviation", (("mean", key, PAIR),), meaning))
        else:
            found.append(Curve(f"Reward: {own}", "score before weighting", ((own, key, PAIR),), "One of the rewards, by itself."))
    for key in terms:
        own = text(key.removeprefix("loss/"), 40).replace("_", " ")
        found.append(Curve(f"Loss: {own}", "term of the loss", ((own, key, PAIR),), "One of the terms that the loss is made of."))
    return found


def _is_dull(curve: Curve, found: Sequence[tuple[str, Series, str]]) -> bool:
    """Whether a coefficient never moved, or the best of a group has nothing to stand beside."""
    if curve.lines[0][1] == "kl_coef":
        return len({value for _, value in known(found[0][1])}) < 2
    return curve.lines[0][1] == "reward_best" and not known(found[0][1])


def _chart(
    name: str,
    curve: Curve,
    found: Sequence[tuple[str, Series, str]],
    events: Sequence[Mapping[str, Any]],
    stage: Mapping[str, Any],
    marks: Sequence[tuple[float, str]],
) -> dict[str, Any]:
    there = [(label, points, kind) for label, points, kind in found if known(points)]
    lines = [Line(label, points, kind) for label, points, kind in there]
    bound = _limit(curve, there[0][1], stage)
    if bound is not None:
        ends = [points[0][0] for _, points, _ in there], [points[-1][0] for _, points, _ in there]
        lines.append(Line("limit", [(min(ends[0]), bound), (max(ends[1]), bound)], "limit"))
    svg = line_chart(
        lines, name=f"{curve.title}, stage {name}", x_label="step", y_label=curve.unit, marks=marks, most=_POINTS, share=curve.say is _share
    )
    said = [_ends(label, points, curve.say, alone=len(there) == 1) for label, points, _ in there]
    said += [_ends(label, series(events, key), _share, alone=False) for label, key in curve.beside if known(series(events, key))]
    key = [(line.label, line.kind) for line in lines] if len(lines) > 1 else []
    return {"title": curve.title, "key": key, "svg": svg, "caption": f"{words.capital('; '.join(said))}. {curve.meaning}"}


def _ends(label: str, points: Series, say: Callable[[float], str], *, alone: bool) -> str:
    """`reward 0.31 at step 1, 0.52 at step 40`."""
    there = known(points)
    ends = there[:1] if len(there) == 1 else [there[0], there[-1]]
    said = ", ".join(f"{say(value)} at step {words.count(step)}" for step, value in ends)
    return said if alone else f"{label} {said}"


def _limit(curve: Curve, points: Series, stage: Mapping[str, Any]) -> float | None:
    """The stop rule's bound in the chart's unit, where there is one in sight."""
    limit = number(mapping(stage.get("watch")).get(curve.limit)) if curve.limit else None
    there = known(points)
    if limit is None or not there:
        return None
    if curve.limit == "max_length_ratio":
        limit *= there[0][1]
    return limit if limit <= _LIMIT_IN_SIGHT * max(value for _, value in there) else None
