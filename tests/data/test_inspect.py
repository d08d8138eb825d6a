"""`tunesmith init FILE`: the proposed recipe is one that loads and whose data are accepted as they stand."""

from __future__ import annotations

import json
import random

import pyarrow as pa
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from pyarrow import parquet

from tunesmith.data.check import check_data
from tunesmith.data.guess import answer_kind, derive_schema, guess_columns, lacks_header
from tunesmith.data.inspect import _block, _quoted, _scalar, find_test, inspect_file, propose_recipe, recipe_name
from tunesmith.data.read import read_records
from tunesmith.errors import DataRefused, MissingFile
from tunesmith.recipe import Recipe, load_recipe

LABELS = ["refund", "delivery: late", "yes"]


def write(path, text) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


def classified(count: int, seed: int) -> str:
    draw = random.Random(seed)
    rows = [f'"message {draw.randrange(10**9)} about {word}",{word}\n' for word in LABELS * (count // 3)]
    return "text,category\n" + "".join(rows)


def tickets(count: int, seed: int = 0, system: bool = False) -> str:
    lines = []
    for index in range(count):
        ticket = {"intent": LABELS[index % 2], "urgent": index % 3 == 0, "summary": f"Customer {seed} writes about thing {index}"}
        messages = [{"role": "user", "content": f"my thing {seed}-{index} broke"}, {"role": "assistant", "content": json.dumps(ticket)}]
        lines.append(json.dumps({"messages": [{"role": "system", "content": "Be exact."}, *messages] if system else messages}))
    return "\n".join(lines)


def accepted(folder, files: dict[str, str]) -> tuple[Recipe, str]:
    """Writes the proposed files, loads the recipe and runs reading and checks as a run would."""
    for name, text in files.items():
        assert "/" not in name
        (folder / name).write_text(text, encoding="utf-8")
    name = next(iter(files))
    recipe = load_recipe(folder / name)
    train = read_records(recipe.data.train, recipe.data, system=recipe.task.description)
    test = read_records(recipe.data.test, recipe.data).records if recipe.data.test else []
    assert check_data(train.records, test, recipe.data).records
    return recipe, files[name]


def test_a_classification_csv_gets_its_columns_labels_and_gate(tmp_path):
    path = write(tmp_path / "support" / "train.csv", classified(30, 1))
    write(tmp_path / "support" / "test.csv", classified(9, 2))
    recipe, text = accepted(tmp_path, propose_recipe(path, folder=tmp_path))
    assert recipe.name == "support"
    assert recipe.model.name == "smollm2-135m-instruct"
    assert recipe.data.columns == {"prompt": "text", "completion": "category"}
    assert recipe.task.labels == "auto"
    assert all(label in recipe.task.description for label in LABELS)
    assert recipe.task.metrics == ["exact_match", "macro_f1"]
    (gate,) = recipe.evaluate.gates
    assert (gate.metric, gate.candidate, gate.better_than) == ("exact_match", "tuned", "few_shot")
    assert "classical" in recipe.evaluate.candidates
    assert yaml.safe_load(text)["data"]["train"] == "support/train.csv"
    assert not text.startswith("# yaml-language-server")


def test_every_setting_of_a_proposed_recipe_has_a_comment(tmp_path):
    path = write(tmp_path / "train.csv", classified(30, 1))
    write(tmp_path / "test.csv", classified(9, 2))
    for text in propose_recipe(path, folder=tmp_path).values():
        settings = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
        leaves = [line for line in settings if (not line.rstrip().endswith(":") and not line.startswith("    ")) or ": {" in line]
        assert all("# " in line or line.endswith(">-") or "better_than" in line for line in leaves), leaves


def test_without_a_test_file_the_recipe_says_that_nothing_can_be_proved(tmp_path):
    recipe, text = accepted(tmp_path, propose_recipe(write(tmp_path / "bank.csv", classified(30, 1)), folder=tmp_path))
    assert recipe.data.test is None
    assert recipe.evaluate.gates == []
    assert "without one nothing can be proved" in text


def test_json_answers_get_a_schema_of_the_training_rows_alone(tmp_path):
    path, test = (
        write(tmp_path / "tickets.jsonl", tickets(24)),
        write(tmp_path / "held.jsonl", tickets(6, seed=1).replace('\\"refund', '\\"lost', 1)),
    )
    files = propose_recipe(path, test, folder=tmp_path)
    recipe, text = accepted(tmp_path, files)
    assert "# 1 of 6 test answers do not: mend them or widen the schema before a run" in text
    schema = json.loads(files["tickets.schema.json"])
    assert recipe.task.output_schema == str(tmp_path / "tickets.schema.json")
    assert schema["properties"] == {
        "intent": {"type": "string", "enum": ["delivery: late", "refund"]},
        "urgent": {"type": "boolean"},
        "summary": {"type": "string"},
    }
    for record in read_records(path, recipe.data).records:
        Draft202012Validator(schema).validate(json.loads(record.answer))
    assert recipe.task.metrics == ["exact_match", "field_accuracy", "macro_f1", "rougeL", "json_validity"]
    assert "intent is one of: delivery: late, refund." in recipe.task.description


def test_rows_with_a_system_message_of_their_own_keep_it(tmp_path):
    recipe, text = accepted(tmp_path, propose_recipe(write(tmp_path / "tickets.jsonl", tickets(24, system=True)), folder=tmp_path))
    record = read_records(recipe.data.train, recipe.data, system=recipe.task.description).records[0]
    assert record.messages[0].content == "Be exact."
    assert "rows bring their own system message" in text


def test_training_rows_that_are_test_rows_are_proposed_to_be_dropped_with_their_number(tmp_path):
    text = classified(30, 1)
    path = write(tmp_path / "train.csv", text)
    write(tmp_path / "test.csv", "\n".join([*text.splitlines()[:4], *classified(9, 2).splitlines()[1:]]) + "\n")
    recipe, proposed = accepted(tmp_path, propose_recipe(path, folder=tmp_path))
    assert recipe.data.test_overlap == "drop"
    assert "3 training rows are also test rows" in proposed


@pytest.mark.parametrize(
    "name, rows, metric, candidates",
    [
        (
            "alpaca.json",
            [{"instruction": f"Tell a story on {i}", "output": f"Once there was a {i} " + "and then " * 20} for i in range(20)],
            "rougeL",
            3,
        ),
        ("maths.json", [{"question": f"{i}+{i}?", "answer": str(2 * i)} for i in range(20)], "exact_match", 3),
        ("books.json", [{"text": f"Chapter {i}. It was a dark night."} for i in range(20)], None, 2),
        (
            "talks.json",
            [{"dialog": [{"role": "user", "content": f"hi {i}"}, {"role": "assistant", "content": f"yo {i}"}]} for i in range(20)],
            "exact_match",
            3,
        ),
        (
            "share.json",
            [{"conversations": [{"from": "human", "value": f"hi {i}"}, {"from": "gpt", "value": f"yo {i}"}]} for i in range(20)],
            "exact_match",
            3,
        ),
    ],
)
def test_other_formats_get_a_recipe_that_is_accepted_too(tmp_path, name, rows, metric, candidates):
    recipe, _ = accepted(tmp_path, propose_recipe(write(tmp_path / name, json.dumps(rows)), folder=tmp_path))
    assert recipe.task.metrics[:1] == ([metric] if metric else [])
    assert len(recipe.evaluate.candidates) == candidates


def test_a_parquet_file_and_odd_names_are_quoted_as_yaml_needs_it(tmp_path):
    table = pa.table({"Text": [f"sentence {i}" for i in range(20)], "my: label # 1": [str(i % 2) for i in range(20)]})
    (tmp_path / "in put").mkdir()
    parquet.write_table(table, tmp_path / "in put" / "my rows: 1.parquet")
    recipe, _ = accepted(tmp_path, propose_recipe(str(tmp_path / "in put" / "my rows: 1.parquet"), folder=tmp_path))
    assert recipe.name == "my-rows-1"
    assert recipe.data.columns == {"prompt": "Text", "completion": "my: label # 1"}


def test_a_row_longer_than_the_context_is_proposed_to_be_dropped(tmp_path):
    rows = [{"prompt": f"q{i}", "completion": f"word{i} " * (5_000 if i == 3 else 1)} for i in range(20)]
    recipe, _ = accepted(tmp_path, propose_recipe(write(tmp_path / "long.json", json.dumps(rows)), folder=tmp_path))
    assert recipe.data.too_long == "drop"


def test_a_text_column_beside_one_of_repeated_values_is_proposed_as_a_classification(tmp_path):
    path = write(tmp_path / "moods.csv", "text,emotion\n" + "".join(f"it is {i},{'joy' if i % 2 else 'rage'}\n" for i in range(20)))
    recipe, _ = accepted(tmp_path, propose_recipe(path, folder=tmp_path))
    assert recipe.data.columns == {"prompt": "text", "completion": "emotion"}


def test_columns_that_cannot_be_told_are_asked_for_and_not_guessed(tmp_path):
    path = write(tmp_path / "a.csv", "alpha,beta,gamma\n" + "x,y,z\n" * 5)
    with pytest.raises(DataRefused, match=r"data.columns"):
        propose_recipe(path)
    with pytest.raises(MissingFile):
        propose_recipe(str(tmp_path / "absent.csv"))


def test_a_test_file_beside_it_that_cannot_be_used_is_named_and_left_out(tmp_path):
    path = write(tmp_path / "train.csv", classified(30, 1))
    write(tmp_path / "test.jsonl", "")
    recipe, text = accepted(tmp_path, propose_recipe(path, folder=tmp_path))
    assert recipe.data.test is None
    assert "test.jsonl was not taken: the file is empty" in text


@pytest.mark.parametrize(
    "name, sibling",
    [("train.csv", "test.csv"), ("a_train.jsonl", "a_test.jsonl"), ("rows.csv", "test.jsonl"), ("Training.csv", "test.csv")],
)
def test_a_sibling_named_for_the_test_set_is_found(tmp_path, name, sibling):
    path = write(tmp_path / name, "x")
    assert find_test(path) is None
    assert find_test(write(tmp_path / sibling, "x")) is None or sibling != "test.csv"
    assert find_test(path) == str(tmp_path / sibling)


def test_a_file_of_the_training_files_own_stem_is_not_taken_for_the_test_set(tmp_path):
    path = write(tmp_path / "test.csv", classified(30, 1))
    for suffix in (".jsonl", ".tsv", ".parquet"):
        write(tmp_path / f"test{suffix}", "x")
    assert find_test(path) is None
    recipe, _ = accepted(tmp_path, propose_recipe(path, folder=tmp_path))
    assert recipe.data.test is None


def test_a_table_whose_first_line_is_a_row_is_refused_and_one_with_names_is_not(tmp_path):
    rows = "the lamp is broken,defect\nwhere is it,delivery\nit smells,defect\n"
    with pytest.raises(DataRefused, match="no header"):
        inspect_file(write(tmp_path / "bare.csv", rows))
    assert inspect_file(write(tmp_path / "named.csv", "what,why\n" + rows)).columns == {"prompt": "what", "completion": "why"}
    assert not lacks_header([{"message": "label", "label": "label"}])
    assert lacks_header([{"a sentence of five words or more": "b", "x": "y"}])


@pytest.mark.parametrize(
    "rows, columns",
    [
        ([{"id": "1", "text": "hello there", "category": "a"}], {"prompt": "text", "completion": "category"}),
        ([{"Question": "how?", "Answer": "so", "level": "x"}], {"prompt": "Question", "completion": "Answer"}),
        ([{"foo": "a long sentence", "bar": "x"}], {"prompt": "foo", "completion": "bar"}),
        ([{"text": f"it {i}", "emotion": "joy" if i % 2 else "rage"} for i in range(8)], {"prompt": "text", "completion": "emotion"}),
        ([{"text": f"it {i}", "source": "web" if i % 2 else "book"} for i in range(8)], None),
        ([{"text": f"it {i}", "emotion": f"a text of its own {i}"} for i in range(8)], None),
        ([{"text": "it"}], None),
        ([{"foo": "longer than it", "label": "x"}], {"prompt": "foo", "completion": "label"}),
        ([{"body": "only one"}], {"text": "body"}),
        ([{"turns": [{"from": "human", "value": "x"}]}], {"conversations": "turns"}),
        ([{"a": "x", "b": "y", "c": "z"}], None),
        ([{"prompt": "x", "completion": "y"}], None),
        ([], None),
    ],
)
def test_columns_are_guessed_by_values_names_and_length(rows, columns):
    assert guess_columns(rows) == columns


def test_the_kind_of_the_answers_is_told_from_all_of_them():
    assert answer_kind(['{"a": 1}', '{"a": 2}']) == "json"
    assert answer_kind(['{"a": 1}', "sorry"] * 4) == "classification"
    assert answer_kind(["yes", "no"] * 5) == "classification"
    assert answer_kind([str(i) for i in range(10)]) == "free"
    assert answer_kind([str(i % 200) for i in range(1000)]) == "free"
    assert answer_kind(["x" * 100, "y"] * 5) == "free"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats(-5, 5) | st.sampled_from(["a", "b"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("pqr"), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.dictionaries(st.sampled_from("xyz"), json_values), min_size=1, max_size=12))
def test_every_object_satisfies_the_schema_derived_from_it(objects):
    validator = Draft202012Validator(derive_schema(objects))
    assert all(validator.is_valid(one) for one in objects)


def test_a_derived_schema_is_narrow():
    schema = derive_schema([{"a": "x", "b": [1]}, {"a": "y", "b": []}] * 3)
    assert schema["additionalProperties"] is False
    assert schema["required"] == ["a", "b"]
    assert schema["properties"] == {"a": {"type": "string", "enum": ["x", "y"]}, "b": {"type": "array", "items": {"type": "integer"}}}


@settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
    | st.sampled_from(["yes", "null", "1", "a: b", "- a", "#x", "../a", "{a}", "é"])
)
def test_any_text_comes_back_from_its_yaml(text):
    assert yaml.safe_load(f"k: {_scalar(text)}") == {"k": text}
    assert yaml.safe_load(f"{{k: {_quoted(text)}}}") == {"k": text}
    assert yaml.safe_load("\n".join(_block("k", text))) == {"k": text}


def test_a_name_is_made_of_the_file_or_the_folder_and_is_always_a_recipes_name(tmp_path):
    assert recipe_name(str(tmp_path / "banking77" / "train.csv")) == "banking77"
    assert recipe_name(str(tmp_path / "My Tickets (v2).jsonl")) == "My-Tickets-v2"
    assert recipe_name("acme/tickets@main:train") == "tickets"
    assert recipe_name("/données.csv") == "donn-es"
    assert recipe_name("/数据.csv") == "my-run"


def test_an_inspection_says_what_a_file_holds(tmp_path):
    found = inspect_file(write(tmp_path / "train.csv", classified(30, 1)))
    assert (found.kind, found.labels, len(found.answers), found.has_system) == ("classification", sorted(LABELS), 30, False)
