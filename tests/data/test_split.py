"""The validation split: by the hash of the row and the seed, never by position."""

from __future__ import annotations

import random

import pytest

from tunesmith.data.preference import make_pair
from tunesmith.data.records import Message, Source, make_document
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
