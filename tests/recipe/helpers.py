"""A recipe of two stages as text and as values, and what is refused of it."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from tunesmith.errors import RecipeError
from tunesmith.recipe import load_recipe

TEXT = """\
name: mine
model:
  name: smollm2-135m-instruct
data:
  train: rows.jsonl
  test: ../held/out.jsonl
stages:
  - name: sft
    objective: sft
    learning_rate: 2e-4
  - name: more
    objective: {type: sft}
    method: lora
    start_from: sft
    learning_rate: 1e-5
"""


def values(**changes: Any) -> dict[str, Any]:
    """The recipe as a dict, with changes."""
    return yaml.safe_load(TEXT.replace("e-", ".0e-")) | changes


def refused(source: Any, sets: Any = (), kind: Any = RecipeError) -> RecipeError:
    """The error with which a recipe is refused; it says a mend."""
    with pytest.raises(kind) as raised:
        load_recipe(source, sets)
    assert raised.value.mend
    return raised.value
