"""The ledger: rows in = trained + held out + dropped by reason, or an error."""

from __future__ import annotations

import pytest

from tunesmith.data.ledger import Ledger
from tunesmith.errors import InvariantViolated


def test_a_balanced_ledger_has_the_shape_that_scripts_rely_on():
    ledger = Ledger(rows_in=10, rows_trained=6, rows_held_out=1)
    ledger.drop("duplicate")
    ledger.drop("quarantined", 1)
    ledger.drop("duplicate")
    ledger.drop("too_long", 0)
    ledger.tokens.update(total=100, supervised=40)
    assert ledger.to_json() == {
        "rows_in": 10,
        "rows_trained": 6,
        "rows_held_out": 1,
        "rows_dropped": {"duplicate": 2, "quarantined": 1},
        "tokens": {"total": 100, "supervised": 40, "truncated": 0},
    }


@pytest.mark.parametrize("trained", [5, 7])
def test_a_row_lost_or_counted_twice_raises(trained):
    ledger = Ledger(rows_in=10, rows_trained=trained, rows_held_out=1, rows_dropped={"duplicate": 3})
    with pytest.raises(InvariantViolated, match="does not balance: 10 rows in"):
        ledger.to_json()


def test_a_negative_count_cannot_make_the_sum_right():
    with pytest.raises(InvariantViolated, match="negative count: duplicate"):
        Ledger(rows_in=10, rows_trained=12, rows_dropped={"duplicate": -2}).check()


def test_two_ledgers_share_no_counts():
    first, second = Ledger(), Ledger()
    first.drop("duplicate")
    first.tokens["total"] += 1
    assert second.rows_dropped == {}
    assert second.tokens["total"] == 0
