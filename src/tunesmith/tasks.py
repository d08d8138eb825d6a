"""The frozen tasks of a session, made and checked before anything is trained: a wrong gate or schema costs no training."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .data.prepare import PreparedData
from .data.read import read_records
from .data.records import Conversation, Record
from .errors import DataRefused, ModelError, RecipeError
from .evaluate import Task, check_gates, distinct_answers, freeze_task
from .recipe import Recipe

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


def make_tasks(recipe: Recipe, data: PreparedData, stage_data: Collection[PreparedData] = (), *, has_template: bool = True) -> Tasks:
    """Freezes the tasks. stage_data: what stages train on besides; has_template: whether conversations can be written for the model.

    Raises RecipeError for a schema, metric or gate that does not fit, DataRefused for references that break the schema, ModelError for
    conversations without a chat template.
    """
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
        notes = (*notes, *_unknown_labels(task, given=recipe.task.labels != "auto"))
    check_gates(recipe.evaluate.gates, task)
    for one, where in ((task, "data.test"), (general, "evaluate.general")):
        if one and not has_template and any(item.messages for item in one.items):
            raise ModelError(
                "the model has no chat template, and these rows are conversations",
                where=where,
                mend="set model.chat_template (chatml, or a .jinja file), or give plain text",
            )
    return Tasks(task, validation, general, schema, labels, notes)


def _unknown_labels(task: Task, *, given: bool) -> tuple[str, ...]:
    """A note on items whose reference is no label. Raises DataRefused where the recipe gives the labels."""
    odd = [item for item in task.items if item.reference.strip() not in task.labels]
    if odd and given:
        raise DataRefused(
            f"{len(odd)} of {len(task.items)} references are none of task.labels: {', '.join(item.item_id for item in odd[:5])}",
            where="data.test",
            mend="correct these rows, or add their answers to task.labels",
        )
    what = f"{len(odd)} of {len(task.items)} test items have an answer that no training row has, which counts as wrong for every candidate"
    return (f"{what} that is held to the labels",) if odd else ()


def _schema(path: str) -> dict[str, Any]:
    try:
        schema = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecipeError(f"not JSON: {error}", where=f"task.output_schema: {path}", mend="give a JSON Schema") from error
    if not isinstance(schema, dict):
        raise RecipeError("a JSON Schema is an object", where=f"task.output_schema: {path}", mend='begin with {"type": "object", ...}')
    return schema


def _general(recipe: Recipe, trained_on: Sequence[Record]) -> tuple[Task | None, tuple[str, ...]]:
    """The guard set without rows whose question was trained on; and how many rows are left out, and why."""
    path = recipe.evaluate.general
    if path is None:
        return None, ()
    read = read_records(path, recipe.data.model_copy(update={"columns": {}, "format": "auto"}))
    trained = {_question(row) for row in trained_on}
    rows = [row for row in read.records if _question(row) not in trained]
    if not rows:
        raise RecipeError(
            "no row of the general set is new to the training", where=f"evaluate.general: {path}", mend="give conversations of another kind"
        )
    notes = [f"a row of the general set cannot be used: line {row.line}: {row.reason}" for row in read.rejected]
    gone = len(read.records) - len(rows)
    if gone:
        notes.append(f"{gone} of {len(read.records)} rows of the general set are training rows and were left out")
    return freeze_task("general", rows, metrics=()), tuple(notes)


def _question(row: Record) -> str:
    return "\n".join(m.content for m in row.messages if m.role == "user") if isinstance(row, Conversation) else row.text
