"""The evaluation of runs of several stages on a tiny model: stages as candidates, the gold measure, compared answers, reward models."""

from __future__ import annotations

import gc
import json
import random
import weakref

import numpy as np
import pytest
from tests.pipeline.helpers import announced, read_json, recipe, stage, words, write_rows

import tunesmith
from tunesmith import evaluation
from tunesmith.data.forest import build_forest
from tunesmith.data.preference import make_pair
from tunesmith.data.records import Message, Source
from tunesmith.data.render import encode_prompt, render_records
from tunesmith.data.template import load_template
from tunesmith.errors import RecipeError
from tunesmith.evaluation import open_result
from tunesmith.generate import LocalGenerator, Sampling, stream_seed
from tunesmith.models.heads import load_head
from tunesmith.models.load import load_model
from tunesmith.models.policy import Policy
from tunesmith.recipe import ModelSection

GOLD = """
def checks(prompt, answer):
    letters = sum(c.isalpha() for c in answer)
    return {"short": float(len(answer) < 4), "letters": letters / max(1, len(answer))}
"""


def pairs(count, seed=0):
    draw = random.Random(seed)
    return [{"prompt": words(draw, 3), "chosen": words(draw, 1), "rejected": words(draw, 2)} for _ in range(count)]


def aligned(folder, tiny, **changed):
    """SFT, a reward model, and DPO from SFT; the test rows are pairs."""
    rows = str(write_rows(folder / "pairs.jsonl", pairs(16)))
    stages = [
        stage("sft"),
        stage("reward", objective="reward", data={"train": rows}, start_from="sft"),
        stage("dpo", objective="dpo", data={"train": rows}, start_from="sft"),
    ]
    data = {"test": str(write_rows(folder / "held_out.jsonl", pairs(8, seed=5)))}
    (folder / "gold.py").write_text(GOLD)
    task = {"gold_reward": f"{folder / 'gold.py'}:checks", "metrics": ["preference_accuracy", "gold_reward", "reward"]}
    section = {
        "candidates": ["zero_shot", "sft", "reward", "tuned"],
        "temperature": 1.0,
        "gates": [{"metric": "reward", "better_than": "sft"}],
    }
    return recipe(folder, tiny, stages=stages, data=data, task=task, evaluate=section, **changed)


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("aligned")
    made, events = aligned(folder, tiny), []
    return made, tunesmith.run(made, out=folder / "run", report=events.append), events


def entries(result):
    return result.evaluation["tasks"]["task"]["candidates"]


def opened(result, stage_name, tiny):
    """A stage's result on a base of its own, with the template."""
    loaded = load_model(ModelSection(name=str(tiny), dtype="float32"))
    template = load_template(loaded.tokenizer, ModelSection(name=str(tiny)))
    model = open_result(result.path / "stages" / stage_name / "model", loaded) if stage_name else loaded.model
    return model, loaded, template


def test_each_candidate_has_what_can_be_measured_of_it(finished):
    _, result, _ = finished
    of_answers = {"gold_reward", "gold_reward.short", "gold_reward.letters", "reward"}
    assert {name: set(entry["metrics"]) for name, entry in entries(result).items()} == {
        "zero_shot": {"preference_accuracy", *of_answers},
        "sft": {"preference_accuracy", *of_answers},
        "reward": {"preference_accuracy"},
        "tuned": {"preference_accuracy", *of_answers},
        "shorter": {"preference_accuracy"},
    }
    assert entries(result)["shorter"]["metrics"]["preference_accuracy"]["value"] == 1.0
    assert read_json(result.path / "evaluation.json") == result.evaluation


def test_a_stage_answers_as_its_result_does_on_a_base_of_its_own(finished, tiny):
    _, result, _ = finished
    for candidate, name in (("sft", "sft"), ("tuned", "dpo"), ("zero_shot", None)):
        model, loaded, template = opened(result, name, tiny)
        lines = read_lines(result.path / "samples" / f"task.{candidate}.jsonl")
        prompts = [encode_prompt([Message(**one) for one in line["prompt"]], template, loaded.tokenizer) for line in lines]
        seeds = [stream_seed(0, "evaluate", line["item_id"]) for line in lines]
        generator = LocalGenerator(model, loaded.tokenizer)
        made = generator.generate([p.tolist() for p in prompts], max_new_tokens=4, sampling=Sampling(1.0), seeds=seeds)
        assert [one.text for one in made] == [line["output"] for line in lines]


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def compared_rows(tiny_loaded, template):
    """Chosen and rejected of each held-out pair as tokens, up to the answer's end."""
    found = []
    for one in pairs(8, seed=5):
        record = make_pair(
            [Message("user", one["prompt"])], [Message("assistant", one["chosen"])], [Message("assistant", one["rejected"])], Source("x", 0)
        )
        rows = render_records(record.conversations(), template, tiny_loaded.tokenizer)
        found.append([(row.ids[: np.flatnonzero(row.weights)[-1] + 1], row.weights[: np.flatnonzero(row.weights)[-1] + 1]) for row in rows])
    return found


def test_a_reward_models_accuracy_is_that_of_its_head_on_the_answers_ends(finished, tiny):
    _, result, _ = finished
    model, loaded, template = opened(result, "reward", tiny)
    policy = Policy(model)
    policy.heads["score"] = load_head(result.path / "stages" / "reward" / "model", "score", loaded.width)
    won = []
    for rows in compared_rows(loaded, template):
        chosen, rejected = policy(build_forest(rows), needs={"scores"}).scores.tolist()
        won.append(float(chosen > rejected))
    entry = entries(result)["reward"]
    assert entry["metrics"]["preference_accuracy"]["value"] == np.mean(won)
    assert [line["scores"]["preference_accuracy"] for line in read_lines(result.path / "samples" / "task.reward.jsonl")] == won
    assert entry["reward_model"]["calibration"]["n"] == 8


def test_the_tuned_models_accuracy_is_that_of_its_log_ratio_to_the_stage_it_started_from(finished, tiny):
    _, result, _ = finished
    sums = []
    for name in ("dpo", "sft"):
        model, loaded, template = opened(result, name, tiny)
        policy = Policy(model)
        sums.append([[float(policy(build_forest([row])).logprobs.sum()) for row in rows] for rows in compared_rows(loaded, template)])
    won = [float(ours[0] - start[0] > ours[1] - start[1]) for ours, start in zip(*sums, strict=True)]
    assert [line["scores"]["preference_accuracy"] for line in read_lines(result.path / "samples" / "task.tuned.jsonl")] == won


def test_the_gold_measure_is_the_users_own_function_on_the_answers(finished):
    _, result, _ = finished
    space: dict = {}
    exec(GOLD, space)
    for line in read_lines(result.path / "samples" / "task.tuned.jsonl"):
        checks = space["checks"]("", line["output"])
        assert line["scores"]["gold_reward"] == pytest.approx(sum(checks.values()) / 2)
        assert line["scores"]["gold_reward.letters"] == pytest.approx(checks["letters"])


def test_evaluating_again_scores_nothing_and_gives_the_same(finished):
    made, result, _ = finished
    events: list = []
    again = tunesmith.evaluate(made, out=result.path, report=events.append)
    assert announced(events) == []
    assert again.evaluation == result.evaluation


def test_one_base_is_in_memory_at_a_time(finished, monkeypatch):
    made, result, _ = finished
    for unit in (result.path / evaluation.UNITS).glob("*.json"):
        unit.unlink()
    models, alive = [], []

    def load(section):
        gc.collect()
        alive.append(sum(known() is not None for known in models))
        loaded = load_model(section)
        models.append(weakref.ref(loaded.model))
        return loaded

    monkeypatch.setattr(evaluation, "load_model", load)
    again = tunesmith.evaluate(made, out=result.path)
    assert again.evaluation == result.evaluation
    assert len(alive) >= 2  # sft is put on the base at hand, every other result on a fresh one
    assert set(alive) == {0}


def test_a_stage_that_starts_from_an_earlier_run_is_compared_with_what_that_run_gave(finished, tiny, tmp_path):
    _, earlier, _ = finished
    rows = str(write_rows(tmp_path / "pairs.jsonl", pairs(16)))
    start = earlier.path / "stages" / "sft"
    made = recipe(
        tmp_path,
        tiny,
        stages=[stage("dpo", objective="dpo", data={"train": rows}, start_from=str(start))],
        data={"test": str(write_rows(tmp_path / "held_out.jsonl", pairs(8, seed=5)))},
        task={"metrics": ["preference_accuracy"]},
        evaluate={"candidates": ["tuned"], "gates": []},
    )
    events: list = []
    result = tunesmith.run(made, out=tmp_path / "run", report=events.append)
    assert announced(events) == [f"{model}: logprobs of 16 answers to compare" for model in ("dpo.start", "tuned")]
    held = [line["scores"]["preference_accuracy"] for line in read_lines(result.path / "samples" / "task.tuned.jsonl")]
    assert held == [line["scores"]["preference_accuracy"] for line in read_lines(earlier.path / "samples" / "task.tuned.jsonl")]


def test_test_rows_that_are_prompts_are_answered_and_measured_without_references(tiny, tmp_path):
    draw = random.Random(3)
    test = write_rows(tmp_path / "prompts.jsonl", [{"prompt": words(draw, 3)} for _ in range(6)])
    (tmp_path / "gold.py").write_text(GOLD)
    made = recipe(
        tmp_path,
        tiny,
        data={"test": str(test)},
        task={"gold_reward": f"{tmp_path / 'gold.py'}:checks", "metrics": ["exact_match", "gold_reward"]},
        evaluate={"candidates": ["few_shot", "classical", "sft", "tuned"], "gates": [{"metric": "gold_reward", "better_than": "few_shot"}]},
    )
    result = tunesmith.run(made, out=tmp_path / "run")
    assert entries(result)["tuned"]["not_measured"] == dict.fromkeys(("exact_match", "perplexity"), "6 of 6 items have no reference")
    assert entries(result)["tuned"]["metrics"]["gold_reward"]["n"] == 6
    assert result.report.is_file()
    assert (result.path / "README.md").is_file()


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        ("gold_reward", "task.gold_reward names no function"),
        ("reward", "no stage trains a reward model"),
        ("preference_accuracy", "no preference pairs"),
    ],
)
def test_a_metric_whose_measure_is_not_there_is_refused_before_training(tiny, tmp_path, metric, words):
    made = recipe(tmp_path, tiny, task={"metrics": [metric]}, evaluate={"gates": []})
    with pytest.raises(RecipeError, match=f"{metric} cannot be measured: .*{words}"):
        tunesmith.run(made, out=tmp_path / "run")
    assert not (tmp_path / "run" / "stages").exists()


def test_a_gold_measure_that_does_not_load_is_refused_before_training(tiny, tmp_path):
    (tmp_path / "gold.py").write_text("def other(prompt, answer): return {}")
    made = recipe(
        tmp_path, tiny, task={"gold_reward": f"{tmp_path / 'gold.py'}:checks", "metrics": ["gold_reward"]}, evaluate={"gates": []}
    )
    with pytest.raises(RecipeError, match="it has no function checks"):
        tunesmith.run(made, out=tmp_path / "run")
    assert not (tmp_path / "run" / "stages").exists()
