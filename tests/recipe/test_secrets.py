"""A recipe that holds a secret is refused, and the secret is not repeated."""

from __future__ import annotations

import pytest
from tests.recipe.helpers import TEXT, refused, values

SECRET = "hf_" + "abcdefghij" * 3


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"task": {"description": f"Answer. {SECRET}"}}, "task.description"),
        ({"data": {"train": f"https://me:{SECRET}@host/rows.jsonl"}}, "data.train"),
        ({"task": {"labels": ["a", SECRET]}}, "task.labels.1"),
        ({"tracking": {"project": SECRET}}, "tracking.project"),
        ({"seed": SECRET}, "seed"),
    ],
)
def test_a_recipe_that_holds_a_secret_is_refused_by_key_and_the_secret_is_not_repeated(change, key):
    error = refused(values(**change))
    assert f"`{key}` holds what looks like a secret" in error.what
    assert SECRET not in str(error)


@pytest.mark.parametrize("word", [f"tracking.project={SECRET}", f"{SECRET}", f"task.{SECRET}=1", f"seed={SECRET}"])
def test_a_secret_in_an_override_is_refused_and_not_repeated(word):
    assert "abcdefghij" not in str(refused(values(), [word]))


def test_a_value_of_a_secret_environment_variable_is_refused(monkeypatch):
    monkeypatch.setenv("TRACKER_API_KEY", "swordfish99")
    assert "`tracking.project`" in refused(values(tracking={"project": "my-swordfish99"})).what


def test_a_secret_key_is_refused_without_being_repeated(write):
    error = refused(write(TEXT + f"{SECRET}: 1\n"))
    assert "secret" in error.what
    assert error.where.endswith(":16")
    assert SECRET not in str(error)
