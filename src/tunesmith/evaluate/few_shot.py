"""The few-shot candidate's examples: drawn from training conversations, chosen on the validation items, never on the test set.

Takes the k values and the number of sets; gives seeded example sets, each spread over the labels of the first label field, and
the selection: best on the validation items, ties to the smaller k and then the earlier set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.records import Conversation
from ..score import parse_output
from .candidates import Example
from .task import Task

SHOWN = 3  # examples named in a note


@dataclass(frozen=True)
class ExampleSet:
    """One set of k examples. notes: which examples were skipped, and why."""

    k: int
    index: int
    examples: tuple[Example, ...]
    row_ids: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Trial:
    """An example set's score on the n validation items; value None where there are none."""

    chosen_from: ExampleSet
    metric: str
    value: float | None
    n: int

    def to_json(self) -> dict[str, Any]:
        """The trial as a row of the selection table."""
        drawn = self.chosen_from
        return {
            "k": drawn.k,
            "set": drawn.index,
            "examples": len(drawn.examples),
            "row_ids": list(drawn.row_ids),
            "metric": self.metric,
            "value": self.value,
            "n": self.n,
        }


def draw_sets(
    training: Sequence[Conversation], task: Task, *, ks: Sequence[int], sets: int, seed: int, fits: Callable[[Sequence[Example]], bool]
) -> list[ExampleSet]:
    """`sets` example sets for each k, in the order of ks.

    fits: whether a prompt with these examples leaves room for the answer in the model's context. A k that no set can reach (too few
    usable rows, or a full context) keeps what it has, with a note.
    """
    strata: dict[str | None, list[tuple[str, Example]]] = {}
    for row in training:
        example = example_turns(row, task)
        if example:
            strata.setdefault(task.strata(row.answer), []).append((row.row_id, example))
    return [_draw(strata, k, index, seed, fits) for k in dict.fromkeys(ks) for index in range(sets)]


def example_turns(row: Conversation, task: Task) -> Example | None:
    """A training conversation's turns without its system messages; None for one that cannot be an example.

    Conversations with tools, and answers that break the schema or are none of the labels, are no examples.
    """
    turns = tuple(message for message in row.messages if message.role != "system")
    if row.tools or {message.role for message in turns} != {"user", "assistant"} or any(message.tool_calls for message in turns):
        return None
    if task.fields and parse_output(row.answer, task.fields) is None:
        return None
    if task.labels and row.answer.strip() not in task.labels:
        return None
    return turns if row.answer.strip() else None


def choose(trials: Sequence[Trial]) -> Trial:
    """The best trial; ties go to the smaller k, then to the earlier set; without validation items to the smallest k."""
    return max(trials, key=lambda trial: (trial.value or 0.0, -trial.chosen_from.k, -trial.chosen_from.index))


def selection_json(trials: Sequence[Trial], chosen: Trial) -> dict[str, Any]:
    """{"selected": the choice, "table": every trial, "notes": what was left out}."""
    notes = [note for trial in trials for note in trial.chosen_from.notes]
    if chosen.value is None:
        notes.append("there are no validation items: the examples were not chosen, the first set of the smallest k is used")
    return {"selected": chosen.to_json(), "table": [trial.to_json() for trial in trials], "notes": list(dict.fromkeys(notes))}


def _draw(
    strata: dict[str | None, list[tuple[str, Example]]], k: int, index: int, seed: int, fits: Callable[[Sequence[Example]], bool]
) -> ExampleSet:
    """Goes round the labels in a seeded order, one example each, until there are k that fit."""
    rng = np.random.default_rng([seed, k, index])
    names = sorted(strata, key=lambda name: (name is None, name or ""))
    order = [names[position] for position in rng.permutation(len(names))]
    piles = [[strata[name][position] for position in rng.permutation(len(strata[name]))] for name in order]
    chosen: list[tuple[str, Example]] = []
    notes: list[str] = []
    misfits: list[str] = []
    while len(chosen) < k and any(piles) and len(misfits) < k:
        for pile in piles:
            if not pile or len(chosen) == k or len(misfits) == k:
                continue
            row_id, example = pile.pop()
            if fits([turns for _, turns in chosen] + [example]):
                chosen.append((row_id, example))
            else:
                misfits.append(row_id)
    if misfits:
        named = ", ".join(misfits[:SHOWN]) + (f" and {len(misfits) - SHOWN} more" if len(misfits) > SHOWN else "")
        notes.append(f"few_shot k={k} set {index}: examples skipped, since they would not fit the model's context: {named}")
    if len(chosen) < k:
        notes.append(f"few_shot k={k} set {index}: holds {len(chosen)} examples")
    return ExampleSet(k, index, tuple(example for _, example in chosen), tuple(row_id for row_id, _ in chosen), tuple(notes))
