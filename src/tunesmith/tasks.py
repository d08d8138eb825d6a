"""The frozen tasks of a session, made and checked before anything is trained: a wrong gate or schema costs no training."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .data.check import find_test_overlap
from .data.preference import AnyRecord
from .data.prepare import PreparedData
from .data.read import read_records
from .data.records import Conversation, Record, Source
from .errors import DataRefused, ModelError, RecipeError
from .evaluate import Encoder, Item, Task, check_gates, distinct_answers, encodable, freeze_task, with_item_ids
from .recipe import Recipe
from .score.gold import Gold, gold_function
from .score.metrics import PREFERENCE

MOST_VALIDATION_ITEMS = 200  # each example set of few_shot answers all of them; more would cost more than it tells


@dataclass(frozen=True)
class Tasks:
    """The recipe's own task, the validation items that choices are made on, and the guard set."""

    task: Task | None
    validation: Task | None
    general: Task | None
    schema: dict[str, Any] | None
    labels: Sequence[str] | None
    notes: tuple[str, ...]
    gold: Gold | None = None
    """The recipe's gold measure, which training may watch and never learns from."""

    @property
    def labels_hold(self) -> bool:
        """Whether every test item's answer is one of the labels, so that they can be given and need not be derived."""
        return self.task is None or not _odd(self.task)


def make_tasks(recipe: Recipe, data: PreparedData, stage_data: Collection[PreparedData] = (), *, has_template: bool = True) -> Tasks:
    """Freezes the tasks. stage_data: what stages train on besides; has_template: whether conversations can be written for the model.

    Raises RecipeError for a schema, metric, gate or gold measure that does not fit, DataRefused for references that break the schema,
    ModelError for conversations without a chat template.
    """
    gold = gold_function(recipe.task.gold_reward) if recipe.task.gold_reward else None
    schema = _schema(recipe.task.output_schema) if recipe.task.output_schema else None
    labels = recipe.task.labels
    if labels == "auto":
        labels = distinct_answers(r for r in data.records if isinstance(r, Conversation))
    freeze = {"schema": schema, "labels": labels, "metrics": recipe.task.metrics}
    task = freeze_task("task", data.test_records, **freeze) if data.test_records else None
    held = [r for r in data.validation_records if isinstance(r, Conversation)]
    validation = freeze_task("validation", held[:MOST_VALIDATION_ITEMS], **freeze) if held else None
    general, notes = _general(recipe, [row for part in (data, *stage_data) for row in part.records])
    if len(held) > MOST_VALIDATION_ITEMS:
        notes = (*notes, f"choices are made on the first {MOST_VALIDATION_ITEMS} of {len(held)} validation rows")
    if task and task.labels:
        notes = (*notes, *_unknown_labels(task, data.test_records, given=recipe.task.labels != "auto"))
    if recipe.task.labels == "auto":
        notes = (*notes, *_alike(labels or []))
    elif labels:
        notes = (*notes, *_trained_on_others(labels, data.records))
    _check_sources(recipe, task)
    check_gates(recipe.evaluate.gates, task)
    for one, where in ((task, "data.test"), (general, "evaluate.general")):
        if one and not has_template and any(item.messages for item in one.items):
            raise ModelError(
                "the model has no chat template, and these rows are conversations",
                where=where,
                mend="set model.chat_template (chatml, or a .jinja file), or give plain text",
            )
    return Tasks(task, validation, general, schema, labels, notes, gold)


def encodable_tasks(tasks: Tasks, encoder: Encoder, *, max_new_tokens: int, context_length: int) -> Tasks:
    """The tasks without the items that the model cannot be asked, each listed in `skipped`, with a note.

    Raises DataRefused, before anything is trained, where no item of the test or general set can be asked.
    """
    notes, kept = [*tasks.notes], {}
    for name, where in (("task", "data.test"), ("validation", None), ("general", "evaluate.general")):
        task = getattr(tasks, name)
        if task is None:
            continue
        room = 0 if name == "general" else max_new_tokens  # on the guard set nothing is generated
        kept[name] = encodable(task, encoder, max_new_tokens=room, context_length=context_length)
        gone = kept[name].skipped[len(task.skipped) :]
        if not gone:
            continue
        what = f"{len(gone)} of {len(task.items)} items of {name} cannot be asked: {'; '.join(f'{row}: {why}' for row, why in gone[:5])}"
        if where is not None and not kept[name].items:
            raise DataRefused(what, where=where, mend="mend these rows, or set evaluate.max_new_tokens lower where they are too long")
        notes.append(what)
    return replace(tasks, **kept, notes=tuple(notes))


def _check_sources(recipe: Recipe, task: Task | None) -> None:
    """Refuses a metric whose measure is not there: no gold measure, no reward model, no answers to compare (RecipeError)."""
    metrics = recipe.task.metrics
    lacks = {
        "gold_reward": (not recipe.task.gold_reward, "task.gold_reward names no function", "name one: gold.py:checks"),
        "reward": (
            all(stage.objective.type != "reward" for stage in recipe.stages),
            "no stage trains a reward model",
            "add a stage with objective reward",
        ),
        PREFERENCE: (
            task is not None and not task.is_compared,
            "the rows of data.test are no preference pairs and no rankings",
            "name a file of pairs in data.test, or leave the metric out",
        ),
    }
    for metric in metrics:
        missing, what, mend = lacks.get(metric, (False, "", ""))
        if missing:
            raise RecipeError(f"{metric} cannot be measured: {what}", where="task.metrics", mend=mend)


def _odd(task: Task) -> list[Item]:
    """The items whose reference is none of the labels."""
    return [item for item in task.items if task.labels and (item.reference or "").strip() not in task.labels]


def _unknown_labels(task: Task, records: Sequence[AnyRecord], *, given: bool) -> tuple[str, ...]:
    """A note on items whose reference is no label. Raises DataRefused, with the rows' places, where the recipe gives the labels."""
    odd = _odd(task)
    if odd and given:
        sources = {item_id: record.source for item_id, record in with_item_ids(records)}
        named = _named((item.reference or "", sources[item.item_id]) for item in odd[:5])
        raise DataRefused(
            f"{len(odd)} of {len(task.items)} references are none of task.labels: {named}",
            where="data.test",
            mend="correct these rows, or add their answers to task.labels",
        )
    what = f"{len(odd)} of {len(task.items)} test items have an answer that no training row has, which counts as wrong for every candidate"
    return (f"{what} that is held to the labels",) if odd else ()


def _trained_on_others(labels: Sequence[str], records: Sequence[AnyRecord]) -> tuple[str, ...]:
    """A note on rows to train on whose answer is none of the labels that the recipe gives."""
    allowed = {label.strip() for label in labels}
    odd = [one for one in records if isinstance(one, Conversation) and one.answer.strip() not in allowed]
    named = _named((one.answer, one.source) for one in odd[:5])
    return (f"{len(odd)} of {len(records)} rows to train on have an answer that is none of task.labels: {named}",) if odd else ()


def _named(answers: Iterable[tuple[str, Source]]) -> str:
    """Answers, each with its row's place, so that blanks at an end are seen."""
    return ", ".join(f"{answer[:60]!r} ({source})" for answer, source in answers)


def _alike(labels: Sequence[str]) -> tuple[str, ...]:
    """A note on labels found in the rows that differ in capitals or blanks alone: as likely one label that is written in two ways."""
    written: dict[str, list[str]] = {}
    for label in labels:
        written.setdefault(" ".join(label.casefold().split()), []).append(label)
    twice = ["/".join(ways) for ways in written.values() if len(ways) > 1]
    return (f"labels that differ in capitals or blanks alone count as different ones: {', '.join(twice[:5])}",) if twice else ()


def _schema(path: str) -> dict[str, Any]:
    try:
        schema = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecipeError(f"not JSON: {error}", where=f"task.output_schema: {path}", mend="give a JSON Schema") from error
    if not isinstance(schema, dict):
        raise RecipeError("a JSON Schema is an object", where=f"task.output_schema: {path}", mend='begin with {"type": "object", ...}')
    return schema


def _general(recipe: Recipe, trained_on: Sequence[Record]) -> tuple[Task | None, tuple[str, ...]]:
    """The guard set without rows whose question, or one nearly like it, was trained on; and how many rows are left out, and why."""
    path = recipe.evaluate.general
    if path is None:
        return None, ()
    read = read_records(path, recipe.data.model_copy(update={"columns": {}, "format": "auto"}))
    overlap = find_test_overlap(read.records, trained_on, recipe.data.near_duplicate_threshold)
    rows = [row for index, row in enumerate(read.records) if index not in overlap]
    if not rows:
        raise RecipeError(
            "no row of the general set is new to the training", where=f"evaluate.general: {path}", mend="give conversations of another kind"
        )
    notes = [f"a row of the general set cannot be used: line {row.line}: {row.reason}" for row in read.rejected]
    if overlap:
        notes.append(f"{len(overlap)} of {len(read.records)} rows of the general set are training rows, or nearly, and were left out")
    return freeze_task("general", rows, metrics=()), tuple(notes)
