"""Directions: one table says which way is better."""

from __future__ import annotations

from typing import get_args

import pytest

from tunesmith.errors import RecipeError
from tunesmith.recipe.task import Metric
from tunesmith.score import METRIC_DIRECTION, METRIC_UNIT, direction, improvement_sign


def test_every_metric_a_recipe_can_name_has_a_direction_and_a_unit():
    assert set(get_args(Metric)) <= set(METRIC_DIRECTION)
    assert set(METRIC_DIRECTION) == set(METRIC_UNIT)


def test_a_misspelt_metric_is_refused_with_the_nearest_name():
    with pytest.raises(RecipeError, match="exact_match"):
        direction("exact_mach")
    assert improvement_sign("perplexity") == -1
