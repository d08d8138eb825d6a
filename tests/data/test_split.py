"""The validation split: by the hash of the row and the seed, never by position."""

from __future__ import annotations

import random

import pytest

from tunesmith.data.preference import make_pair, make_prompt
from tunesmith.data.records import Message, Source, make_conversation, make_document
from tunesmith.data.split import split_validation


def rows(count: int):
    return [make_document(f"row {index}", Source("a.jsonl", index + 1)) for index in range(count)]


@pytest.mark.parametrize(
    "count, share, held", [(100, 0.1, 10), (400, 0.1, 40), (3, 0.1, 1), (2, 0.9, 1), (10, 0.0, 0), (1, 0.5, 0), (0, 0.5, 0)]
)
def test_the_stated_share_is_held_out_and_a_training_row_always_remains(count, share, held):
    train, held_out = split_validation(rows(count), share, seed=0)
    assert (len(held_out), len(train)) == (held, count - held)


def test_the_split_does_not_depend_on_the_order_of_the_rows_and_keeps_it():
    records = rows(50)
    shuffled = random.Random(1).sample(records, 50)
    train, held_out = split_validation(records, 0.2, seed=3)
    train_again, held_out_again = split_validation(shuffled, 0.2, seed=3)
    assert {record.row_id for record in held_out} == {record.row_id for record in held_out_again}
    assert train == [record for record in records if record in train]
    assert train_again == [record for record in shuffled if record in train_again]


def test_another_seed_holds_out_other_rows():
    records = rows(200)
    first, second = ({record.row_id for record in split_validation(records, 0.1, seed)[1]} for seed in (0, 1))
    assert len(first & second) < 10


def test_identical_rows_fall_on_the_same_side():
    twins = [make_document(f"row {index % 10}", Source("a.jsonl", index + 1)) for index in range(40)]
    for seed in range(20):
        train, held_out = split_validation(twins, 0.1, seed)
        assert held_out
        assert not {record.row_id for record in train} & {record.row_id for record in held_out}
    assert split_validation(twins[::10], 0.5, 0) == (twins[::10], [])


def test_few_rows_change_sides_when_rows_are_added():
    before, after = split_validation(rows(200), 0.1, 0)[1], split_validation(rows(210), 0.1, 0)[1]
    assert len(set(before) - set(after)) <= 3


def test_a_held_out_pair_is_of_a_prompt_that_no_training_pair_has():
    said = {name: Message("assistant", name) for name in "abc"}
    pairs = [
        make_pair([Message("user", f"question {number // 4}")], [said[one]], [said[other]], Source("a.jsonl", number))
        for number, (one, other) in enumerate(["ab", "bc", "ac", "ca"] * 25)
    ]
    train, held = split_validation(pairs, 0.1, seed=0)
    assert len(train) + len(held) == 100
    assert 10 <= len(held) < 14
    assert {record.prompt for record in train}.isdisjoint(record.prompt for record in held)


def conversations(count: int, prompts: int, weight: float | None = None):
    return [
        make_conversation(
            [
                Message("user", "hello"),
                Message("assistant", "hi", weight=weight),
                Message("user", f"question {number % prompts}"),
                Message("assistant", f"answer {number}"),
            ],
            Source("a.jsonl", number),
        )
        for number in range(count)
    ]


def test_a_file_read_as_conversations_and_as_prompts_holds_out_the_same_prompts():
    rows = conversations(60, 60)
    asked = [make_prompt(row.prompt(), {"answer": row.answer}, row.source) for row in conversations(60, 60, weight=0.0)]
    for seed in range(3):
        held, again = split_validation(rows, 0.1, seed)[1], split_validation(asked, 0.1, seed)[1]
        assert len(held) == 6
        assert [record.source for record in held] == [record.source for record in again]


def test_a_held_out_conversation_is_of_a_prompt_that_none_was_trained_on():
    train, held = split_validation(conversations(100, 25), 0.1, seed=0)
    assert 10 <= len(held) < 14
    assert {record.messages[2].content for record in train}.isdisjoint(record.messages[2].content for record in held)


def test_one_prompt_of_most_rows_is_never_held_out_and_of_one_prompt_alone_rows_are():
    mixed = [*conversations(80, 1), *conversations(20, 20)[1:]]
    for seed in range(20):
        train, held = split_validation(mixed, 0.1, seed)
        assert (len(held), len(train)) == (10, 89)
    train, held = split_validation(conversations(30, 1), 0.1, seed=0)
    assert (len(held), len(train)) == (3, 27)


def test_where_every_prompt_has_more_rows_than_are_wanted_the_smallest_is_held_out():
    _, held = split_validation([*conversations(10, 2), *conversations(4, 4)[2:3] * 4], 0.05, seed=0)
    assert {record.messages[2].content for record in held} == {"question 2"}
    assert len(held) == 4
