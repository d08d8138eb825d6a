"""Every reward of a stage as one score: by weight, with reward models, an ensemble by its mean or its worst, and NaN where one has none."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from tests.toys import loaded, make_items, make_stage, model_folder, tiny_model, train_stage

from tunesmith.data.preference import PromptOnly
from tunesmith.data.records import Message, Source
from tunesmith.errors import RecipeError
from tunesmith.generate.protocol import Generation
from tunesmith.models.methods import attach
from tunesmith.models.policy import Policy
from tunesmith.recipe import LoraMethod
from tunesmith.score.rewards import Scores
from tunesmith.train import scoring
from tunesmith.train.scoring import (
    Answer,
    Prompt,
    StageScorer,
    asked,
    gold_of,
    locate_result,
    named_files,
    named_models,
    stage_scorer,
)

LORA = LoraMethod(r=4)
EXACT = {"type": "exact_answer", "column": "answer"}


def answer(text: str, number: int = 0, **columns) -> Answer:
    turns = (Message("system", "be brief"), Message("user", f"question {number}"))
    record = PromptOnly(turns, columns, f"p{number}", Source("p.jsonl", number))
    return Answer(Prompt(record, np.array([5, 6, 7])), Generation([8 + number, 9], text, "stop", [-1.0, -2.0]))


ANSWERS = [answer("yes", 0, answer="yes"), answer("no", 1, answer="yes"), answer("no", 2, answer="no")]


def model_of(*scores: float) -> SimpleNamespace:
    return SimpleNamespace(scores=lambda answers: np.array(scores))


def program(*scores: float):
    total = np.array(scores)
    reasons = {"it broke": int(np.isnan(total).sum())} if np.isnan(total).any() else {}
    return lambda prompts, completions, columns: Scores(total, {"program": total.copy()}, int(np.isnan(total).sum()), reasons)


def objective_of(kind: str = "grpo", **settings):
    given = {"rewards": [EXACT]} if kind == "grpo" else {}
    return make_stage(objective={"type": kind, **given, **settings}).objective


@pytest.mark.parametrize("process", [0, 1])
def test_a_process_scores_all_answers_to_a_prompt_or_none(process, monkeypatch):
    asked_with = []
    first, second = answer("a", 0), answer("b", 1)
    answers = [first, replace(first), replace(first), second]  # of three to the first prompt, half of all would leave one
    monkeypatch.setenv("RANK", str(process))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(scoring, "gather", lambda own: [own])
    monkeypatch.setattr(StageScorer, "_scores", lambda self, own: asked_with.extend(own) or Scores(np.zeros(len(own)), {}, 0, {}))
    StageScorer(None)(answers)
    assert [one.generation.text for one in asked_with] == (["a", "a", "a"] if process == 0 else ["b"])


def test_an_answers_tokens_are_the_prompts_and_its_own():
    assert ANSWERS[1].ids.tolist() == [5, 6, 7, 9, 9]
    assert ANSWERS[1].ids.dtype == np.int64


def test_reward_functions_get_the_last_question_the_messages_and_the_columns_that_every_row_has():
    prompts, completions, columns = asked([answer("a", 0, x=1, y=2), answer("b", 1, x=3)])
    assert prompts == ["question 0", "question 1"]
    assert completions == ["a", "b"]
    assert columns.keys() == {"x", "messages"}
    assert columns["x"] == [1, 3]
    assert columns["messages"][1] == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "question 1"}]


def test_rewards_are_added_by_weight_and_each_is_logged_as_it_was():
    found = StageScorer(program(1.0, 2.0, 3.0), {"a": (model_of(10.0, 20.0, 30.0), 0.5), "b": (model_of(1.0, 1.0, 1.0), 0.0)})(ANSWERS)
    assert found.total.tolist() == [6.0, 12.0, 18.0]
    assert {name: values.tolist() for name, values in found.parts.items()} == {
        "program": [1.0, 2.0, 3.0],
        "a": [10.0, 20.0, 30.0],
        "b": [1.0, 1.0, 1.0],
    }
    assert (found.unscorable, found.reasons) == (0, {})


@pytest.mark.parametrize("how, want", [("mean", [2.0, 0.5, 4.0]), ("min", [1.0, -1.0, 4.0])])
def test_an_ensemble_is_its_mean_or_its_worst_and_its_disagreement_is_told(how, want):
    members = [model_of(1.0, 2.0, 4.0), model_of(3.0, -1.0, 4.0)]
    found = StageScorer(None, {}, (members, how))(ANSWERS)
    assert found.total.tolist() == found.parts["reward_model"].tolist() == want
    assert found.parts["disagreement"].tolist() == [1.0, 1.5, 0.0]
    one = StageScorer(None, {}, (members[:1], how))(ANSWERS)
    assert one.total.tolist() == [1.0, 2.0, 4.0]
    assert "disagreement" not in one.parts


def test_an_answer_that_one_reward_cannot_score_has_no_score():
    nan = float("nan")
    found = StageScorer(
        program(1.0, nan, 3.0), {"a": (model_of(nan, 1.0, 1.0), 1.0)}, ([model_of(1.0, 1.0, nan), model_of(1, 1, 1)], "mean")
    )(ANSWERS)
    assert np.isnan(found.total).all()
    assert found.unscorable == 3
    assert found.reasons == {"it broke": 1}
    quiet = StageScorer(None, {"a": (model_of(nan, 1.0, 1.0), 1.0)})(ANSWERS)
    assert np.isnan(quiet.total).tolist() == [True, False, False]
    assert quiet.reasons == {"the reward model cannot read the answer": 1}


def test_a_reward_of_weight_0_is_watched_and_its_missing_scores_take_none_away():
    silent = model_of(float("nan"), 5.0, float("nan"))
    found = StageScorer(program(1.0, 2.0, 3.0), {"watched": (silent, 0.0), "counted": (model_of(1.0, 1.0, 1.0), 1.0)})(ANSWERS)
    assert found.total.tolist() == [2.0, 3.0, 4.0]
    assert (found.unscorable, found.reasons) == (0, {})
    assert np.isnan(found.parts["watched"]).tolist() == [True, False, True]


def test_the_rewards_of_a_recipe_are_made_and_their_columns_asked_for_before_training():
    with stage_scorer(objective_of(), loaded(tiny_model("llama")), None, lambda name: None) as scorer:
        assert scorer(ANSWERS).total.tolist() == [1.0, 0.0, 1.0]
        scorer.check([one.prompt for one in ANSWERS])
        with pytest.raises(RecipeError, match="needs the column answer"):
            scorer.check([ANSWERS[0].prompt, answer("x").prompt])


@pytest.fixture(scope="module")
def rewarded(tmp_path_factory):
    """A run with a reward model of one seed, and one of another."""
    runs, pairs = [], make_items(8)
    for seed in range(2):
        path = tmp_path_factory.mktemp("reward") / "run"
        stage = make_stage(name="reward", objective="reward", method=LORA, max_steps=4 + 4 * seed, learning_rate=2e-2, rows=len(pairs))
        train_stage(loaded(tiny_model("llama")), stage, path, pairs)
        runs.append(path)
    return runs


def test_a_named_reward_model_scores_beside_programs_and_several_make_an_ensemble(rewarded):
    base, here = loaded(tiny_model("llama")), rewarded[0]
    model = attach(base, LORA, seed=0)
    folders = [str(path / "stages" / "reward" / "model") for path in rewarded]
    both = objective_of(
        "ppo", reward_model=["reward", folders[1]], ensemble="min", rewards=[EXACT, {"type": "model", "model": "reward", "weight": 2.0}]
    )
    assert named_models(both) == ["reward", folders[1], "reward"]
    with stage_scorer(both, base, model, lambda name: locate_result(name, here)) as scorer:
        policy = Policy(model)
        scorer.bind(policy)
        found = scorer(ANSWERS)
    assert found.parts.keys() == {"exact_answer", "model_reward", "reward_model", "disagreement"}
    total = found.parts["exact_answer"] + 2 * found.parts["model_reward"] + found.parts["reward_model"]
    np.testing.assert_allclose(found.total, total, rtol=1e-6)
    assert (found.parts["reward_model"] <= found.parts["model_reward"] + 1e-6).all()
    assert found.parts["disagreement"].max() > 1e-3
    assert [name for name, p in policy.named_parameters() if p.requires_grad and ".default." not in name] == []
    single = objective_of("ppo", reward_model=folders[1])
    other = attach(loaded(tiny_model("llama")), LORA, seed=0)
    with stage_scorer(single, base, other, lambda name: locate_result(name, here)) as scorer:
        scorer.bind(Policy(other))
        second = scorer(ANSWERS).total
    np.testing.assert_allclose(found.parts["reward_model"], np.minimum(found.parts["model_reward"], second), rtol=1e-4, atol=1e-5)


def test_two_rewards_of_models_of_one_name_are_both_counted(rewarded):
    folders = [path / "stages" / "reward" / "model" for path in rewarded]
    objective = objective_of(rewards=[{"type": "model", "model": str(folder)} for folder in folders])
    model = attach(loaded(tiny_model("llama")), LORA, seed=0)
    with stage_scorer(objective, loaded(tiny_model("llama")), model, lambda name: locate_result(name, rewarded[0])) as scorer:
        scorer.bind(Policy(model))
        found = scorer(ANSWERS)
    assert found.parts.keys() == {"model_model_0", "model_model_1"}
    np.testing.assert_allclose(found.total, sum(found.parts.values()), rtol=1e-6)


def test_a_result_is_an_earlier_stage_an_earlier_run_or_a_folder(rewarded, tmp_path):
    run = rewarded[0]
    assert locate_result("reward", run) == run / "stages" / "reward" / "model"
    folder = model_folder(tmp_path / "other" / "model")
    assert locate_result(str(tmp_path / "other"), run) == locate_result(str(folder), run) == folder
    with pytest.raises(RecipeError, match="`absent` is no earlier stage, run or model folder"):
        locate_result("absent", run)


def test_the_files_that_rewards_are_read_from_are_named():
    rewards = [EXACT, {"type": "python", "function": "my/rewards.py:polite"}, {"type": "json_schema", "output_schema": "schema.json"}]
    assert named_files(objective_of(rewards=rewards)) == {1: "my/rewards.py", 2: "schema.json"}
    assert named_models(objective_of(rewards=rewards)) == []
    assert named_models(make_stage().objective) == []
    assert named_files(make_stage().objective) == {}


def test_a_gold_measure_sees_questions_and_texts():
    seen = []
    gold = gold_of(lambda prompts, texts: seen.append((list(prompts), list(texts))) or np.zeros(len(texts)))
    assert gold(ANSWERS).tolist() == [0, 0, 0]
    assert seen == [(["question 0", "question 1", "question 2"], ["yes", "no", "no"])]
    assert gold_of(None) is None
