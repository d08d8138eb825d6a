"""The classical candidate: what it learns, what it is scored on, what it is not."""

from __future__ import annotations

import json
import sys

import pytest

from tunesmith.evaluate import freeze_task
from tunesmith.evaluate.classical import answer_text, classical_answers
from tunesmith.evaluate.scoring import score_labels
from tunesmith.score import bootstrap_interval

from .helpers import SCHEMA, desk_rows, row, ticket

METRICS = ["exact_match", "field_accuracy", "macro_f1", "rougeL", "json_validity"]


@pytest.fixture(scope="module")
def desk():
    task = freeze_task("task", desk_rows(24, start=200), schema=SCHEMA, metrics=METRICS)
    validation = freeze_task("validation", desk_rows(12, start=100), schema=SCHEMA)
    return classical_answers(desk_rows(60), validation, task), task


def test_it_learns_labels_that_words_tell_and_is_scored_on_its_label_fields(desk):
    found, task = desk
    scored = score_labels(task, "classical", found.labels)
    assert bootstrap_interval(scored.statistics["exact_match"]).value == 1.0
    assert {"exact_match", "field_accuracy", "field_accuracy.intent", "macro_f1", "macro_f1.urgency"} <= set(scored.statistics)


def test_what_it_cannot_write_is_not_measured_and_the_answer_is_not_whole(desk):
    found, task = desk
    scored = score_labels(task, "classical", found.labels)
    assert not {"rougeL", "json_validity", "perplexity"} & set(scored.statistics)
    assert set(scored.not_measured) == {"rougeL", "json_validity", "perplexity"}
    assert not scored.fills_whole_answer
    assert set(json.loads(answer_text(found.labels[0], task))) == {"intent", "urgency"}


def test_c_is_the_best_on_validation_and_the_table_is_kept_with_its_n(desk, monkeypatch):
    found, task = desk
    assert {one["n"] for one in found.trials} == {12}
    assert found.C == 1.0  # all are equally good here: the smallest
    monkeypatch.setattr(sys.modules[classical_answers.__module__], "REGULARISATION", (1e-6, 10.0, 1e-5))
    lopsided = [one for one in desk_rows(60) if "stop my order" not in one.messages[1].content or one.source.line < 10]
    found = classical_answers(lopsided, freeze_task("validation", desk_rows(12, start=100), schema=SCHEMA), task)
    values = [one["exact_match"] for one in found.trials]
    assert found.C == 10.0
    assert values[1] > max(values[0], values[2])


def test_the_choice_of_c_never_looks_at_the_test_items():
    rows, validation = desk_rows(30), freeze_task("validation", desk_rows(12, start=100), schema=SCHEMA)
    wrong = [row(one.messages[1].content, ticket("cancel", "low")) for one in desk_rows(12, start=300)]
    for test_rows in (desk_rows(12, start=300), wrong):
        found = classical_answers(rows, validation, freeze_task("task", test_rows, schema=SCHEMA))
        assert found.trials == classical_answers(rows, validation, freeze_task("task", desk_rows(3, start=400), schema=SCHEMA)).trials


def test_classification_answers_are_bare_labels_and_whole():
    rows = [row(text, label) for text, label in [("card lost", "a"), ("lost my card", "a"), ("exchange rate", "b"), ("rate today", "b")]]
    task = freeze_task("task", [row("a lost card", "a"), row("what rate", "b")], labels=["a", "b"], metrics=["exact_match", "macro_f1"])
    found = classical_answers(rows, None, task)
    scored = score_labels(task, "classical", found.labels)
    assert [answer_text(labels, task) for labels in found.labels] == ["a", "b"]
    assert scored.fills_whole_answer
    assert list(scored.statistics) == ["exact_match", "macro_f1"]


def test_a_field_with_one_label_in_training_always_gets_it():
    rows = [row(f"lamp {number}", ticket("defect", "low" if number % 2 else "high")) for number in range(8)]
    found = classical_answers(rows, None, freeze_task("task", desk_rows(3, start=90), schema=SCHEMA))
    assert {labels["intent"] for labels in found.labels} == {'"defect"'}


def test_value_fields_leave_exact_match_unmeasured_because_it_cannot_fill_them():
    schema = {"type": "object", "properties": {"kind": {"enum": ["a", "b"]}, "amount": {"type": "number"}}, "required": ["kind", "amount"]}
    rows = [row(f"{kind} thing {n}", json.dumps({"kind": kind, "amount": n})) for n, kind in enumerate("abab")]
    task = freeze_task("task", rows, schema=schema, metrics=["exact_match", "field_accuracy"])
    scored = score_labels(task, "classical", classical_answers(rows, None, task).labels)
    assert list(scored.statistics) == ["field_accuracy.kind"]
    assert scored.not_measured["exact_match"] == "it cannot fill amount"
