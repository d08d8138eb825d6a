"""Directions: one table says which way is better."""

from __future__ import annotations

import math
from typing import get_args

import pytest

from tunesmith.errors import RecipeError
from tunesmith.recipe.task import Metric
from tunesmith.score import METRIC_DIRECTION, METRIC_UNIT, direction, improvement_sign, is_better


def test_every_metric_a_recipe_can_name_has_a_direction_and_a_unit():
    assert set(get_args(Metric)) <= set(METRIC_DIRECTION)
    assert set(METRIC_DIRECTION) == set(METRIC_UNIT)


def test_the_best_step_of_a_falling_then_rising_loss_is_its_lowest_and_of_an_accuracy_its_highest():
    curve = [3.0, 2.0, 1.5, 1.7, 2.5]
    for metric, best_step in (("loss", 2), ("perplexity", 2), ("exact_match", 0), ("field_accuracy.intent", 0)):
        best = None
        for step, value in enumerate(curve):
            if is_better(metric, value, None if best is None else curve[best]):
                best = step
        assert best == best_step, metric


def test_a_nan_is_never_better_and_everything_is_better_than_a_nan():
    assert not is_better("loss", math.nan, None)
    assert not is_better("exact_match", math.nan, 0.0)
    assert is_better("loss", 5.0, math.nan)


def test_a_misspelt_metric_is_refused_with_the_nearest_name():
    with pytest.raises(RecipeError, match="exact_match"):
        direction("exact_mach")
    assert improvement_sign("perplexity") == -1
