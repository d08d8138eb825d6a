"""The examples in the documentation are true, but those marked as too long to run here; the example recipes and their data are sound."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import json
import re
from pathlib import Path

import pytest

from tunesmith.recipe import load_recipe

SOURCE = Path(__file__).parents[1] / "src"
RECIPES = Path(__file__).parents[1] / "recipes"
MODULES = sorted(
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
    for path in SOURCE.rglob("*.py")
    if ">>>" in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_are_true(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def rows_of(name):
    lines = (RECIPES / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def asked(row):
    """The user's message of a row, whatever its format."""
    messages = row.get("prompt") or row["messages"]
    (question,) = (message["content"] for message in messages if message["role"] == "user")
    return question


def squeezed(text):
    return " ".join(re.findall(r"\w+", text.lower()))


def python_file(name):
    path = RECIPES / name
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def gold():
    return python_file("replies/gold.py")


@pytest.mark.parametrize("name", ["quickstart.yaml", "quickstart-rlhf.yaml", "grpo.yaml"])
def test_a_recipe_can_be_read_and_every_file_that_it_names_is_there(name):
    recipe = load_recipe(RECIPES / name)
    sections = [recipe.data, *(stage.data for stage in recipe.stages if stage.data)]
    named = [path for section in sections for path in (section.train, section.test) if path]
    if recipe.task.gold_reward:
        named.append(recipe.task.gold_reward.partition(":")[0])
    assert all(Path(path).is_file() for path in named)


def test_the_alignment_recipes_keep_the_names_that_scripts_rely_on():
    for name, stages, metric in (("quickstart-rlhf", ["sft", "reward", "ppo"], "gold_reward"), ("grpo", ["sft", "grpo"], "exact_match")):
        recipe = load_recipe(RECIPES / f"{name}.yaml")
        assert (recipe.name, recipe.seed) == (name, 0)
        assert [stage.name for stage in recipe.stages] == stages
        assert recipe.task.metrics == [metric]
        assert recipe.evaluate.candidates == ["sft", "tuned"]
        assert [(gate.metric, gate.candidate, gate.better_than) for gate in recipe.evaluate.gates] == [(metric, "tuned", "sft")]


def test_no_training_stage_of_the_recipe_names_the_gold_measure():
    recipe = load_recipe(RECIPES / "quickstart-rlhf.yaml")
    assert recipe.task.gold_reward.endswith("gold.py:checks")
    assert "gold" not in json.dumps([stage.model_dump() for stage in recipe.stages])


@pytest.mark.parametrize(
    "name, at_least",
    [("replies/sft", 150), ("replies/prompts", 200), ("replies/test", 80), ("sums/sft", 300), ("sums/prompts", 600), ("sums/test", 200)],
)
def test_a_file_has_enough_rows_and_no_message_twice(name, at_least):
    questions = [squeezed(asked(row)) for row in rows_of(f"{name}.jsonl")]
    assert len(questions) >= at_least
    assert len(set(questions)) == len(questions)


def test_no_test_message_of_the_replies_occurs_in_what_is_trained_on():
    training = {squeezed(asked(row)) for name in ("sft", "prompts", "pairs") for row in rows_of(f"replies/{name}.jsonl")}
    assert not training & {squeezed(asked(row)) for row in rows_of("replies/test.jsonl")}


def test_no_sum_is_in_two_files_not_even_turned_round():
    seen = [frozenset(re.findall(r"\d+", asked(row))) for name in ("sft", "prompts", "test") for row in rows_of(f"sums/{name}.jsonl")]
    assert len(set(seen)) == len(seen)


def test_every_sum_has_its_right_answer():
    for name in ("sft", "prompts", "test"):
        for row in rows_of(f"sums/{name}.jsonl"):
            a, b = re.fullmatch(r"(\d\d) \+ (\d\d) =", asked(row)).groups()
            assert int(row["answer"] if "answer" in row else row["messages"][-1]["content"]) == int(a) + int(b)


def test_the_sums_are_what_their_script_makes():
    made = python_file("sums/make_sums.py").make_sums()
    assert all(rows_of(f"sums/{name}.jsonl") == rows for name, rows in made.items())


def test_the_desk_s_replies_are_short_all_different_and_leave_room_above_them(gold):
    rows = rows_of("replies/sft.jsonl")
    replies = [row["messages"][-1]["content"] for row in rows]
    assert len({squeezed(reply) for reply in replies}) == len(replies)
    assert max(len(reply.split()) for reply in replies) <= 25
    mean = sum(gold.gold(asked(row), reply) for row, reply in zip(rows, replies, strict=True)) / len(rows)
    assert 0.3 < mean < 0.5


@pytest.mark.parametrize(
    "answer, met",
    [
        ("Sorry! The yellow lamp will leave today.", {"polite", "own_words", "acts", "ends"}),
        ("The yellow lamp left our house on Monday.", {"own_words", "ends"}),
        ("Which lamp is it?", {"acts"}),
        ("We'll look", {"acts"}),
        ("PLEASE wait for it until noon!", {"polite", "ends"}),
        ("pleased to meet lamps, yellowish ones, goodwill", {"polite"}),
        ("please thank lamp yellow ?", {"polite", "own_words", "acts"}),
        ("", set()),
    ],
)
def test_the_gold_checks_hold_on_answers_made_by_hand(gold, answer, met):
    found = gold.checks("Where is my yellow lamp? It should have come with order 2207.", answer)
    assert found == {name: float(name in met) for name in ("polite", "own_words", "acts", "ends")}


def test_stop_words_and_numbers_are_not_the_customer_s_own_words(gold):
    message = "Where have these come from, and what about 2207 and 4471?"
    assert gold.checks(message, message)["own_words"] == 0.0


def test_a_tenth_of_the_pairs_names_the_worse_answer_by_the_gold_measure(gold):
    rows = rows_of("replies/pairs.jsonl")
    gains = [gold.gold(asked(row), row["chosen"][0]["content"]) - gold.gold(asked(row), row["rejected"][0]["content"]) for row in rows]
    assert 300 <= len(rows) <= 500
    assert all(gains)
    assert sum(gain < 0 for gain in gains) == round(0.1 * len(rows))


def test_no_pair_occurs_twice_in_either_order():
    pairs = [
        (asked(row), frozenset((row["chosen"][0]["content"], row["rejected"][0]["content"]))) for row in rows_of("replies/pairs.jsonl")
    ]
    assert len(set(pairs)) == len(pairs)


def test_the_pair_maker_pairs_only_answers_that_the_measure_tells_apart(monkeypatch):
    monkeypatch.syspath_prepend(RECIPES / "replies")
    maker = python_file("replies/make_pairs.py")
    better, worse = "Sorry! The lamp will leave today.", "no"
    assert maker.make_pairs(["Where is my lamp?"] * 2, [[better, worse, worse], ["no", "none", " no"]]) == [
        {
            "prompt": [{"role": "user", "content": "Where is my lamp?"}],
            "chosen": [{"role": "assistant", "content": better}],
            "rejected": [{"role": "assistant", "content": worse}],
        }
    ]
