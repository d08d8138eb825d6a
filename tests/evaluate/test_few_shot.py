"""Few-shot examples: drawn from training rows over the labels, chosen on validation."""

from __future__ import annotations

import pytest

from tunesmith.data.records import Message, Source, make_conversation
from tunesmith.evaluate import freeze_task
from tunesmith.evaluate.few_shot import ExampleSet, Trial, choose, draw_sets, example_turns, selection_json

from .helpers import SCHEMA, desk_rows, row, ticket


@pytest.fixture
def task():
    return freeze_task("task", desk_rows(3, start=90), schema=SCHEMA)


def draw(rows, task, ks, sets=2, seed=0, fits=lambda examples: True):
    return draw_sets(rows, task, ks=ks, sets=sets, seed=seed, fits=fits)


def intents(drawn, task):
    return [task.strata(example[-1].content) for example in drawn.examples]


def test_the_first_label_fields_labels_are_covered_even_when_one_is_rare(task):
    rows = [row(f"lamp {number}", ticket("defect")) for number in range(50)] + desk_rows(3)
    for drawn in draw(rows, task, [3, 6], sets=5):
        assert len(set(intents(drawn, task))) == 3
        assert len(set(drawn.row_ids)) == drawn.k


def test_sets_are_a_pure_function_of_the_seed_and_differ_from_one_another(task):
    rows = desk_rows(60)
    assert draw(rows, task, [2, 4], seed=1) == draw(rows, task, [2, 4], seed=1)
    assert draw(rows, task, [4], seed=1) != draw(rows, task, [4], seed=2)
    one, other = draw(rows, task, [4])
    assert one.row_ids != other.row_ids


def test_an_example_that_would_not_fit_is_skipped_with_a_note_and_another_takes_its_place(task):
    long = row("long " * 70, ticket("refund"))
    rows = [long, *desk_rows(6)]

    def small(examples):
        return sum(len(message.content.split()) for example in examples for message in example) < 70

    for drawn in draw(rows, task, [3], sets=8, fits=small):
        assert long.row_id not in drawn.row_ids
        assert len(drawn.examples) == 3
    notes = [note for drawn in draw(rows, task, [3], sets=8, fits=small) for note in drawn.notes]
    assert any(long.row_id in note and "would not fit" in note for note in notes)


def test_a_context_that_holds_nothing_ends_the_search_and_says_so(task):
    (drawn,) = draw(desk_rows(400), task, [4], sets=1, fits=lambda examples: False)
    assert drawn.examples == ()
    skipped, held = drawn.notes
    assert skipped.startswith("few_shot k=4 set 0: examples skipped, since they would not fit the model's context: ")
    assert skipped.endswith(" and 1 more")
    assert held == "few_shot k=4 set 0: holds 0 examples"


def test_rows_with_tools_or_answers_outside_the_schema_or_labels_are_no_examples(task):
    assert example_turns(row("q", "free words"), task) is None
    assert example_turns(row("q", ticket()), task) == (Message("user", "q"), Message("assistant", ticket()))
    tools = ({"type": "function", "function": {"name": "f"}},)
    with_tools = make_conversation([Message("user", "q"), Message("assistant", ticket())], Source("a", 1), tools=tools)
    assert example_turns(with_tools, task) is None
    labels = freeze_task("task", [row("q", "a")], labels=["a"])
    assert example_turns(row("q", "b"), labels) is None
    assert example_turns(row("q", "a"), labels) is not None


def trial(k, index, value):
    return Trial(ExampleSet(k, index, (), ()), "exact_match", value, 10)


def test_the_best_trial_wins_and_ties_go_to_the_smaller_k_and_then_the_earlier_set():
    assert choose([trial(2, 0, 0.1), trial(8, 1, 0.6), trial(4, 1, 0.6), trial(4, 0, 0.6), trial(8, 0, 0.2)]) == trial(4, 0, 0.6)


def test_the_whole_table_is_reported_and_without_validation_items_it_says_so():
    trials = [trial(4, 0, None), trial(2, 0, None)]
    found = selection_json(trials, choose(trials))
    assert found["selected"]["k"] == 2
    assert [entry["k"] for entry in found["table"]] == [4, 2]
    assert "no validation items" in found["notes"][-1]
