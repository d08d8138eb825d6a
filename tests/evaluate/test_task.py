"""Freezing a task: what is an item, what is not, and what the hash covers."""

from __future__ import annotations

import copy

import pytest

from tunesmith.data.records import Message, Source, make_conversation
from tunesmith.errors import DataRefused, RecipeError
from tunesmith.evaluate import distinct_answers, freeze_task
from tunesmith.evaluate.task import task_summary

from .helpers import SCHEMA, desk_rows, row, ticket


def test_the_prompt_is_what_comes_before_the_last_assistant_turn_and_the_reference_is_its_text():
    messages = [Message("user", "one"), Message("assistant", "two"), Message("user", "three"), Message("assistant", "four")]
    task = freeze_task("task", [make_conversation(messages, Source("a", 1), system="be brief")])
    (item,) = task.items
    assert [message.content for message in item.messages] == ["be brief", "one", "two", "three"]
    assert item.reference == "four"
    assert item.source_text == "one\ntwo\nthree"


def test_the_hash_changes_with_any_item_the_schema_or_the_metrics_and_with_nothing_else():
    def frozen(rows, **settings):
        return freeze_task("task", rows, **{"schema": SCHEMA, "metrics": ["exact_match"], **settings}).sha256

    rows = desk_rows(4)
    assert frozen(rows) == frozen(desk_rows(4))
    other_schema = copy.deepcopy(SCHEMA)
    other_schema["properties"]["intent"]["enum"].append("other")
    changed = [
        frozen(rows[:3]),
        frozen(rows[::-1]),
        frozen([*rows[:3], row("other words", ticket())]),
        frozen([*rows[:3], row(rows[3].messages[1].content, ticket("cancel", "high"))]),
        frozen([row(rows[0].messages[1].content, rows[0].answer, system="other system"), *rows[1:]]),
        frozen(rows, schema=other_schema),
        frozen(rows, metrics=["exact_match", "macro_f1"]),
    ]
    assert len({frozen(rows), *changed}) == 1 + len(changed)


def test_a_row_that_occurs_twice_makes_two_items_with_ids_of_their_own():
    task = freeze_task("task", [row("a", "b"), row("a", "b"), row("c", "d")])
    assert len({item.item_id for item in task.items}) == 3
    assert task.items[1].item_id == task.items[0].item_id + "-2"


def test_rows_that_cannot_be_asked_are_listed_with_their_reason_and_counted():
    call = {"type": "function", "function": {"name": "look_up", "arguments": {}}}
    rows = [
        row("fine", "answer"),
        make_conversation([Message("user", "a"), Message("assistant", "", tool_calls=(call,))], Source("a", 2)),
        make_conversation([Message("user", "a"), Message("assistant", " ")], Source("a", 3)),
        make_conversation([Message("assistant", "hello")], Source("a", 4)),
        make_conversation([Message("assistant", "hello"), Message("user", "a")], Source("a", 5)),
    ]
    task = freeze_task("task", rows)
    assert len(task.items) + len(task.skipped) == len(rows)
    assert [reason for _, reason in task.skipped] == [
        "the last assistant turn calls tools, which is not scored",
        "the last assistant turn has no text",
        "nothing comes before the answer",
        "the last turn is not the assistant's",
    ]
    assert task_summary(task)["n"] == 1
    assert sum(task_summary(task)["skipped"].values()) == 4


def test_a_reference_that_breaks_the_schema_is_refused_by_its_row_id():
    bad = row("lamp", ticket(intent="something else"))
    with pytest.raises(DataRefused, match=bad.row_id) as caught:
        freeze_task("task", [row("ok", ticket()), bad], schema=SCHEMA)
    assert caught.value.exit_status == 3


@pytest.mark.parametrize(
    ("metric", "settings"),
    [
        ("json_validity", {}),
        ("macro_f1", {}),
        ("rougeL", {"labels": ["a", "b"]}),
        ("field_accuracy", {"labels": ["a", "b"]}),
        ("rougeL", {"schema": {"type": "object", "properties": {"intent": {"enum": ["a"]}}}}),
    ],
)
def test_a_metric_that_such_answers_do_not_have_is_refused_before_anything_runs(metric, settings):
    with pytest.raises(RecipeError, match=metric):
        freeze_task("task", [], metrics=[metric], **settings)


def test_a_schema_and_labels_together_are_refused():
    with pytest.raises(RecipeError, match="not both"):
        freeze_task("task", [], schema=SCHEMA, labels=["a"])


def test_auto_labels_are_the_sorted_distinct_answers_of_the_training_rows():
    assert distinct_answers([row("x", "b "), row("y", "a"), row("z", "b")]) == ["a", "b"]


def test_a_classification_answer_is_scored_without_surrounding_space():
    task = freeze_task("task", [row("x", "a")], labels=["a", "b"], metrics=["exact_match", "macro_f1"])
    found = task.score(" a\n", "a")
    assert (found.scores, found.labels) == ({"exact_match": 1.0}, {"label": "a"})
