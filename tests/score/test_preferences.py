"""Which answer is preferred, and what a reward model's scores depend on besides: numbers computed by hand."""

from __future__ import annotations

import math

import pytest

from tunesmith.score.preferences import accuracy_by_place, calibration, item_accuracy, length_bias


def test_an_items_accuracy_is_the_share_of_its_pairs_and_a_tie_counts_a_half():
    assert item_accuracy([[2.0, 1.0], [1.0, 2.0], [1.0, 1.0], [3.0, 1.0, 2.0]]) == [1.0, 0.0, 0.5, pytest.approx(2 / 3)]


def test_the_calibration_error_is_the_gap_between_confidence_and_how_often_it_is_right():
    sure = 1 / (1 + math.exp(-3.0))  # both in the bin from 0.95: one of two is right
    assert calibration([[3.0, 0.0], [0.0, 3.0]]) == {"expected_calibration_error": pytest.approx(sure - 0.5), "n": 2}
    unsure = 1 / (1 + math.exp(-0.5))  # in a bin of its own
    both = calibration([[3.0, 0.0], [0.0, 3.0], [0.5, 0.0]])
    assert both["expected_calibration_error"] == pytest.approx((2 * (sure - 0.5) + (1 - unsure)) / 3)


def test_a_model_that_cannot_tell_is_calibrated_at_a_half():
    assert calibration([[1.0, 1.0], [0.0, 0.0]]) == {"expected_calibration_error": 0.0, "n": 2}


def test_length_bias_is_seen_in_the_correlation_and_on_pairs_by_which_is_the_shorter():
    lengths = [[5.0, 2.0], [1.0, 4.0], [3.0, 3.0]]
    bias = length_bias(lengths, lengths)  # scores are the lengths
    assert bias["pearson"] == pytest.approx(1.0)
    assert bias["spearman"] == pytest.approx(1.0)
    assert bias["n"] == 6
    assert bias["accuracy_where_longer_is_preferred"] == {"value": 1.0, "n": 1}
    assert bias["accuracy_where_shorter_is_preferred"] == {"value": 0.0, "n": 1}


def test_without_spread_there_is_no_correlation():
    bias = length_bias([[1.0, 1.0]], [[2.0, 3.0]])
    assert (bias["pearson"], bias["spearman"]) == (None, None)
    assert bias["accuracy_where_longer_is_preferred"] == {"value": None, "n": 0}


def test_accuracy_by_place_says_where_in_a_ranking_it_is_wrong():
    assert accuracy_by_place([[3.0, 1.0, 2.0], [3.0, 2.0, 1.0]]) == [
        {"place": 1, "value": 1.0, "n": 4},
        {"place": 2, "value": 0.5, "n": 2},
    ]
