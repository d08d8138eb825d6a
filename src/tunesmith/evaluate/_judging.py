"""Numbers about answers that need no reference: the gold measure, the run's reward models, and which of a row's answers a model prefers.

Takes the evaluation's work; adds each candidate's item scores to what is measured. Every part is a unit of work, kept like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..errors import NonFinite
from ..score.gold import Unscorable, lost_words
from ..score.metrics import PREFERENCE
from ..score.preferences import SHORTER, item_accuracy, reward_model_json
from ._work import Work, notes_of
from .encode import Dialogue
from .inputs import BASE, OVER_START, Compares
from .scoring import Scored, unscored
from .task import Task

GOLD, REWARD = "gold_reward", "reward"
Numbers = list[list[float]]
"""For each item a number an answer."""

WORDS: dict[Compares, str] = {
    "score": "by the score of its head",
    "log_ratio": "by log-probability over that of its start",
    "mean_log_ratio": "by mean log-probability over that of its start",
    "logprob": "by log-probability",
    "mean_logprob": "by mean log-probability",
}


def ask_gold(work: Work, task: Task) -> None:
    """The gold measure of every answer given: `gold_reward`, the mean of the checks, and each check as `gold_reward.NAME`."""
    gold = work.inputs.gold
    if GOLD not in task.metrics or gold is None:
        return
    prompts = [item.messages[-1].content for item in task.items]
    for candidate in _answering(work, task):
        texts = [text or "" for text in work.outputs[task.name, candidate][0]]

        def measure(texts: Sequence[str] = texts) -> dict[str, Any]:
            found = gold.checks(prompts, texts)
            return {"checks": [one.reason if isinstance(one, Unscorable) else one for one in found]}

        key = [gold.sha256, task.sha256, texts]
        payload = work.unit(
            f"{task.name}.{work.unit_name(candidate)}.gold", key, measure, f"{candidate}: the gold measure of {len(texts)} answers"
        )
        scored, checks = work.results[task.name, candidate], payload["checks"]
        lost = lost_words(gold.name, checks)
        if lost is not None:
            scored = scored.without_metric(GOLD, lost)
            work.notes.append(f"{candidate} has no {GOLD}: {lost}")
        else:
            scored = scored.with_metric(GOLD, [sum(one.values()) / len(one) for one in checks])
            for name in checks[0]:
                scored = scored.with_metric(f"{GOLD}.{name}", [one[name] for one in checks])
        work.keep(scored, {}, payload["seconds"])


def ask_reward_models(work: Work, task: Task) -> None:
    """The mean score that the run's reward models give each answer, as `reward`; of several models their mean."""
    if REWARD not in task.metrics:
        return
    candidates = _answering(work, task)
    asked = work.encode(task, (), references=False).prompts if candidates else []
    sums = {candidate: np.zeros(len(asked)) for candidate in candidates}
    for name in work.inputs.reward_models:
        model = work.inputs.model_of(name)
        opened: list[Any] = []
        for candidate in candidates:
            rows = [[*prompt, *answer] for prompt, answer in zip(asked, work.token_ids[task.name, candidate], strict=True)]
            payload = work.unit(
                f"{task.name}.{work.unit_name(candidate)}.reward.{name}",
                [work.model_id(model), rows],
                lambda rows=rows, model=model, opened=opened: {"scores": _scores(work, model, opened, rows)},
                f"{candidate}: the score of {len(rows)} answers by {name}",
            )
            sums[candidate] += np.array(payload["scores"], dtype=np.float64)
            work.keep(work.results[task.name, candidate], {}, payload["seconds"])
    for candidate, total in sums.items():
        if work.inputs.reward_models:
            scored = work.results[task.name, candidate].with_metric(REWARD, (total / len(work.inputs.reward_models)).tolist(), None)
        else:
            scored = work.results[task.name, candidate].without_metric(REWARD, "no stage of the run trained a reward model")
        work.keep(scored, {}, 0.0)


def _answering(work: Work, task: Task) -> list[str]:
    """The candidates whose answers to the task are there."""
    return [candidate for name, candidate in work.token_ids if name == task.name]


def _scores(work: Work, model: str, opened: list[Any], rows: Sequence[Sequence[int]]) -> list[float]:
    """A score head's numbers; the model is opened at the first call, when no other is at hand."""
    if not opened:
        work.release()
        opened.append(work.inputs.result_of(model).scores())
    found = np.asarray(opened[0](rows), dtype=np.float64)
    if not np.isfinite(found).all():
        raise NonFinite("a reward is not finite", where=model, mend="the weights are damaged: train the reward model again")
    return [float(one) for one in found]


class Comparison:
    """Which of each item's answers every candidate prefers. Models are asked one at a time; `conclude` when all have been."""

    def __init__(self, work: Work, task: Task | None):
        self.work, self.task = work, task
        self.candidates: dict[str, Compares] = {}
        """The candidates that compare answers, and how."""
        self.needs: dict[str, set[str]] = {}
        """Model to what is asked of it: `logprobs`, `scores`."""
        self.numbers: dict[tuple[str, str], Numbers] = {}
        self.seconds: dict[str, float] = {}
        self._rows: list[list[Dialogue]] = []
        self.asked = task is not None and task.is_compared and PREFERENCE in task.metrics
        if not self.asked:
            work.absent[SHORTER] = f"it stands beside {PREFERENCE}, which is not asked for"
            return
        for candidate in work.wanted:
            model = work.inputs.model_of(candidate)
            if candidate in ("few_shot", "classical") or not work.has_model(model):
                continue
            result = work.inputs.result_of(model)
            if result.compares in OVER_START and not work.has_model(result.start):
                work.absent[candidate] = "what it started from is not there to compare it with"
                continue
            self.candidates[candidate] = result.compares
            self.needs.setdefault(model, set()).add("scores" if result.compares == "score" else "logprobs")
            if result.compares in OVER_START:
                self.needs.setdefault(result.start, set()).add("logprobs")

    @property
    def rows(self) -> list[list[Dialogue]]:
        """Each item's dialogues as tokens."""
        if not self._rows:
            encoder = self.work.inputs.encoder
            self._rows = [[encoder.dialogue(one) for one in item.compared] for item in self.task.items]
        return self._rows

    @property
    def lengths(self) -> Numbers:
        """Tokens of each answer."""
        return [[float(sum(one.own)) for one in item] for item in self.rows]

    def ask(self, model: str) -> None:
        """What is wanted of one model."""
        for what in sorted(self.needs.get(model, ())):
            measure = self._measure_logprobs if what == "logprobs" else self._measure_scores
            rows = [[(one.prompt, one.answer, one.own) for one in item] for item in self.rows]
            payload = self.work.unit(
                f"{self.task.name}.{model}.compared.{what}",
                [self.work.model_id(model), rows],
                lambda measure=measure: measure(model),
                f"{model}: {what} of {sum(map(len, rows))} answers to compare",
            )
            self.numbers[model, what] = payload["numbers"]
            self.seconds[model] = self.seconds.get(model, 0.0) + payload["seconds"]

    def conclude(self) -> None:
        """Adds every candidate's accuracy, a reward model's account, and the candidate that prefers the shorter answer."""
        for candidate, compares in self.candidates.items():
            model = self.work.inputs.model_of(candidate)
            values = self._values(model, compares)
            entry: dict[str, Any] = {"model": self.work.model_id(model), "compares": WORDS[compares]}
            if compares == "score":
                entry["reward_model"] = reward_model_json(values, self.lengths)
            self._keep(candidate, values, entry, self.seconds.get(model, 0.0), self.work.inputs.encoder.sha256)
        if len(set(self.candidates.values())) > 1:
            how = "; ".join(f"{candidate} compares {WORDS[compares]}" for candidate, compares in self.candidates.items())
            self.work.notes.append(f"{PREFERENCE}: {how}. Part of a difference may be that of the yardsticks")
        if self.candidates or (self.asked and SHORTER in self.work.wanted):
            texts = [[sum(len(m.content) for m in one.messages[len(item.messages) :]) for one in item.compared] for item in self.task.items]
            self._keep(SHORTER, [[-float(size) for size in item] for item in texts], {"compares": "by characters, fewer first"}, 0.0, None)

    def _keep(self, candidate: str, values: Numbers, entry: dict[str, Any], seconds: float, template: str | None) -> None:
        key = self.task.name, candidate
        scored: Scored = self.work.results.get(key) or unscored(self.task, candidate, template_sha256=template)
        self.work.absent.pop(candidate, None)
        if "reward_model" in entry or candidate == SHORTER:  # it compares answers and writes none
            scored = replace(scored, fills_whole_answer=False)
        self.work.keep(scored.with_metric(PREFERENCE, item_accuracy(values)), entry, seconds)
        none: list[str | None] = [None] * len(values)
        self.work.outputs.setdefault(key, (none, none))

    def _values(self, model: str, compares: Compares) -> Numbers:
        """Each answer's number: what the candidate prefers has the larger one."""
        if compares == "score":
            return self.numbers[model, "scores"]
        start = self.numbers[self.work.inputs.result_of(model).start, "logprobs"] if compares in OVER_START else None
        return compared_numbers(compares, self.numbers[model, "logprobs"], start, self.lengths)

    def _measure_logprobs(self, model: str) -> dict[str, Any]:
        """The log-probability in nats of each answer's own tokens, in float64."""
        flat = [one for item in self.rows for one in item]
        generator = self.work.generator(model)
        found = generator.logprobs([one.prompt for one in flat], [one.answer for one in flat])
        sums = [float(np.asarray(row, np.float64)[one.own].sum()) for row, one in zip(found, flat, strict=True)]
        if not np.isfinite(sums).all():
            raise NonFinite("a log-probability is not finite", where=model, mend="the weights are damaged: train again")
        return {"numbers": self._by_item(sums), "notes": notes_of(generator)}

    def _measure_scores(self, model: str) -> dict[str, Any]:
        flat = _scores(self.work, model, [], [[*one.prompt, *one.answer] for item in self.rows for one in item])
        return {"numbers": self._by_item(flat)}

    def _by_item(self, flat: Sequence[float]) -> Numbers:
        rest = iter(flat)
        return [[next(rest) for _ in item] for item in self.rows]


def compared_numbers(compares: Compares, sums: Numbers, start: Numbers | None, lengths: Numbers) -> Numbers:
    """What answers are compared by, from their log-probabilities: `sums` of the model, `start` of what it started from (None where that
    is not asked), both in nats an answer; lengths: supervised tokens of each."""
    if compares in OVER_START:
        if start is None:
            raise ValueError(f"{compares} without the log-probabilities of the start")
        sums = _each(lambda ours, theirs: ours - theirs, sums, start)
    return _each(lambda total, count: total / count, sums, lengths) if compares.startswith("mean") else sums


def _each(combine: Callable[[float, float], float], first: Numbers, second: Numbers) -> Numbers:
    return [[combine(a, b) for a, b in zip(x, y, strict=True)] for x, y in zip(first, second, strict=True)]


def models_in_order(work: Work, comparison: Comparison) -> list[str]:
    """The models besides the base that something is asked of: stages in order and other starts, then the tuned one."""
    wanted = {work.inputs.model_of(name) for name in work.wanted if name not in ("zero_shot", "few_shot", "classical", SHORTER)}
    wanted |= set(comparison.needs) - {BASE}
    order = [name for name in work.inputs.results if name in wanted]
    return [*order, *sorted(wanted - set(order))]
