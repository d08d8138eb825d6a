"""Recipes are YAML 1.2 with plain tags only; what would cost memory or run code is refused by name and line."""

from __future__ import annotations

import pytest

from tunesmith.errors import RecipeError
from tunesmith.recipe import load_recipe
from tunesmith.recipe._yaml import MAX_BYTES, dump_yaml, parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4),
        ("1e5", 1e5),
        ("+1.5E+3", 1500.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("12", 12),
        ("-3", -3),
        ("010", 10),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("on", "on"),
        ("off", "off"),
        ("yes", "yes"),
        ("No", "No"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("0x1f", "0x1f"),
        ("2026-01-31", "2026-01-31"),
        ("1e5x", "1e5x"),
        ("'1e5'", "1e5"),
        ("!!str 12", "12"),
    ],
)
def test_scalars_are_read_as_yaml_1_2_says(text, value):
    parsed, _ = parse_yaml(f"a: {text}", "here")
    assert parsed == {"a": value}
    assert type(parsed["a"]) is type(value)


def test_every_key_has_the_line_it_stands_on():
    _, lines = parse_yaml("a: 1\n\nb:\n  - c: 2\n    d: 3\n  - {e: 4}\n", "here")
    assert lines[("a",)] == 1
    assert lines[("b",)] == 3
    assert lines[("b", 0, "d")] == 5
    assert lines[("b", 1, "e")] == 6


def refused(text: str | bytes, tmp_path) -> RecipeError:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RecipeError) as raised:
        load_recipe(path)
    assert str(path) in raised.value.where
    assert raised.value.mend
    return raised.value


@pytest.mark.parametrize(
    ("text", "what", "line"),
    [
        ("name: a\nname: b\n", "`name` is given twice", 2),
        ("model:\n  name: a\n  dtype: auto\n  name: b\n", "`name` is given twice", 4),
        ("name: a\nmodel: {name: [b\n", "not readable as YAML", 3),
        ("name: a\n\tmodel: b\n", "not readable as YAML", 2),
        ("name: a\n---\nname: b\n", "not readable as YAML", 2),
        ("name: *a\n", "not readable as YAML", 1),
        ("? [a, b]\n: 1\n", "not readable as YAML", 1),
        ("name: a\nmodel: !!python/object/apply:os.system [ls]\n", "the tag !!python/object/apply:os.system is not taken", 2),
        ("name: !!binary aGk=\n", "the tag !!binary is not taken", 1),
        ("name: !!timestamp 2026-01-01\n", "the tag !!timestamp is not taken", 1),
        ("name: !mine a\n", "the tag !mine is not taken", 1),
        ("a: !!set {b, c}\n", "the tag !!set is not taken", 1),
    ],
)
def test_what_is_not_plain_yaml_is_refused_with_its_line(text, what, line, tmp_path):
    error = refused(text, tmp_path)
    assert what in error.what
    assert error.where.endswith(f":{line}")


@pytest.mark.parametrize("text", ["data:\n  train: a\n   test: b\n", "name: a: b\n"])
def test_of_lines_that_are_not_set_under_each_other_it_is_said_what_to_look_at(text, tmp_path):
    mend = refused(text, tmp_path).mend
    assert "begin in one column" in mend
    assert "in quotes" in mend


@pytest.mark.parametrize("text", ["", "# nothing\n", "- a\n- b\n", "name\n", "3\n", "null\n"])
def test_a_file_that_holds_no_mapping_is_refused(text, tmp_path):
    assert refused(text, tmp_path).what == "a recipe is a mapping of sections"


def test_an_alias_bomb_is_refused_before_it_unfolds(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    assert "too many nodes, counting each alias" in refused("\n".join(lines), tmp_path).what


def test_an_alias_to_itself_is_refused(tmp_path):
    refused("a: &a [*a]\n", tmp_path)


def test_an_alias_is_a_copy(tmp_path):
    values, _ = parse_yaml("a: &x {b: 1}\nc: *x\n", "here")
    assert values == {"a": {"b": 1}, "c": {"b": 1}}


def test_a_deep_nest_is_refused(tmp_path):
    assert refused("a: " + "[" * 5000, tmp_path).what == "nested too deeply"


def test_a_recipe_over_the_size_cap_is_refused_unread(tmp_path):
    assert f"larger than {MAX_BYTES} bytes" in refused(b"#" * (MAX_BYTES + 1), tmp_path).what
    refused(b"#" * MAX_BYTES, tmp_path)


def test_a_recipe_that_is_no_utf8_is_refused_with_the_byte(tmp_path):
    error = refused("name: caf\xe9\n".encode("latin-1"), tmp_path)
    assert error.what == "not UTF-8 text (byte 9)"


@pytest.mark.parametrize("text", [b"name: a\0b\n", b"\x7fELF\x01\x02", "name: \ud800\n".encode("utf-8", "surrogatepass")])
def test_bytes_that_are_no_text_are_refused(text, tmp_path):
    refused(text, tmp_path)


def test_text_that_looks_like_a_number_is_quoted_when_dumped():
    values = {
        "a": ["1e5", "12", "on", "2026-01-01", "0x1f", "1_000", ".inf", "~", "", " x", "a: b", "\x85", "\u2028"],
        "b": 1e-8,
        "c": 1e22,
    }
    assert parse_yaml(dump_yaml(values), "here")[0] == values
