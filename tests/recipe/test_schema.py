"""The JSON Schema that editors use says what the loader says, and each setting is documented and read by something."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from pydantic import BaseModel

from tunesmith.recipe import Recipe, json_schema, load_recipe
from tunesmith.recipe._base import sections_of, type_names

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "tunesmith"
COMMITTED = ROOT / "recipes" / "recipe.schema.json"
QUICKSTART = ROOT / "recipes" / "quickstart.yaml"


def sections(section: type[BaseModel] = Recipe) -> set[type[BaseModel]]:
    """A section and all below it."""
    inner = {found for field in section.model_fields.values() for found in sections_of(field.annotation)}
    return {section}.union(*map(sections, inner))


SETTINGS = sorted((section.__name__, name) for section in sections() for name in section.model_fields)


def test_the_committed_schema_is_the_exported_one():
    assert json.loads(COMMITTED.read_text(encoding="utf-8")) == json_schema(), "run: tunesmith schema > recipes/recipe.schema.json"


def test_the_quickstart_names_the_schema_beside_it():
    first = QUICKSTART.read_text(encoding="utf-8").splitlines()[0]
    assert first == f"# yaml-language-server: $schema={COMMITTED.name}"


def validator() -> jsonschema.Draft202012Validator:
    jsonschema.Draft202012Validator.check_schema(json_schema())
    return jsonschema.Draft202012Validator(json_schema())


def test_the_schema_takes_every_recipe_of_the_project():
    recipes = sorted((ROOT / "recipes").glob("*.yaml"))
    assert QUICKSTART in recipes
    for path in recipes:
        validator().validate(yaml.safe_load(path.read_text(encoding="utf-8")))
        load_recipe(path)


@pytest.mark.parametrize("stage", [{}, {"method": "lora"}, {"method": {"type": "full"}}, {"method": None}, {"objective": {"type": "sft"}}])
def test_the_schema_takes_bare_names_and_whole_sections(stage):
    recipe = yaml.safe_load(QUICKSTART.read_text(encoding="utf-8"))
    recipe["stages"] = [{"name": "sft", "objective": "sft", "learning_rate": 1e-4, **stage}]
    validator().validate(recipe)


@pytest.mark.parametrize("stage", [{"method": "lor"}, {"rank": 3}, {"learning_rate": "fast"}, {"learning_rate": 0}, {"objective": "stf"}])
def test_the_schema_refuses_what_the_loader_refuses(stage):
    recipe = yaml.safe_load(QUICKSTART.read_text(encoding="utf-8"))
    recipe["stages"] = [{"name": "sft", "objective": "sft", "learning_rate": 1e-4, **stage}]
    assert not validator().is_valid(recipe)


def test_every_setting_is_described():
    undescribed = [
        f"{section.__name__}.{name}" for section in sections() for name, field in section.model_fields.items() if not field.description
    ]
    assert undescribed == []


@pytest.mark.parametrize(("section", "name"), SETTINGS)
def test_every_setting_is_read_by_something(section, name, read_names):
    assert name in read_names, f"{section}.{name} is a setting that nothing outside recipe/ reads"


@pytest.fixture(scope="module")
def read_names() -> set[str]:
    """Every attribute that the source outside recipe/ reads, but not from `self`, which is no section there."""
    names = set()
    for path in SOURCE.rglob("*.py"):
        if SOURCE / "recipe" in path.parents:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Load)
                and not (isinstance(node.value, ast.Name) and node.value.id == "self")
            ):
                names.add(node.attr)
    return names


def test_a_method_and_an_objective_have_different_names():
    for field in ("method", "objective"):
        from tunesmith.recipe import Stage

        names = type_names(Stage.model_fields[field].annotation)
        assert names
        assert len(names) == len(set(names))
