"""What a stage's rewards need is tried out in time: files before the model is loaded, functions and columns before a stage is trained."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tests.pipeline.helpers import recipe, stage, words, write_rows

import tunesmith
from tunesmith import preparation
from tunesmith.errors import MissingFile, RecipeError, TunesmithError


def learning(folder: Path, model: Path, rewards: list[dict], **changed) -> dict:
    """A recipe whose second stage learns from prompts, the last of which lack the column `late`."""
    draw = random.Random(5)
    rows = [{"prompt": words(draw), "answer": "red"} | ({"late": i} if i < 6 else {}) for i in range(8)]
    prompts = {"train": str(write_rows(folder / "prompts.jsonl", rows)), "format": "prompt", "validation": 0}
    objective = {"type": "grpo", "num_generations": 2, "rewards": rewards}
    rollout = {"prompts_per_step": 2, "max_new_tokens": 4}
    stages = [stage(), stage("learn", objective=objective, rollout=rollout, data=prompts)]
    return recipe(folder, model, stages=stages, **changed)


def refused(tmp_path, made: dict, kind: type[TunesmithError]) -> TunesmithError:
    with pytest.raises(kind) as raised:
        tunesmith.run(made, out=tmp_path / "run")
    assert raised.value.mend
    assert not (tmp_path / "run" / "stages").exists()
    return raised.value


FILES = {
    "python": {"type": "python", "function": "absent.py:polite"},
    "json_schema": {"type": "json_schema", "output_schema": "absent.json"},
}


@pytest.mark.parametrize("kind", [*FILES, "gold"])
def test_a_file_of_a_reward_that_is_not_there_is_named_before_the_model_is_loaded(tiny, tmp_path, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preparation, "load_model", lambda section: pytest.fail("the model was loaded"))
    rewards = [FILES.get(kind, {"type": "regex", "pattern": "x"})]
    task = {"gold_reward": "absent.py:gold"} if kind == "gold" else {}
    error = refused(tmp_path, learning(tmp_path, tiny, rewards, task=task), MissingFile)
    assert "absent." in error.where
    assert error.where.startswith("task.gold_reward" if kind == "gold" else "stages.learn.objective.rewards.0")
    assert error.exit_status == 2


@pytest.mark.parametrize("column", ["late", "never"])
def test_a_column_that_not_every_row_has_is_an_error_before_any_stage_is_trained(tiny, tmp_path, column):
    rewards = [{"type": "regex", "pattern": "x"}, {"type": "exact_answer", "column": column}]
    error = refused(tmp_path, learning(tmp_path, tiny, rewards), RecipeError)
    assert f"reward exact_answer needs the column {column}" in str(error)
    assert "answer" in error.what


def test_a_function_that_its_file_has_not_is_an_error_before_any_stage_is_trained(tiny, tmp_path):
    (tmp_path / "mine.py").write_text("def polite(prompts, completions, **columns):\n    return [0.0] * len(prompts)\n")
    error = refused(tmp_path, learning(tmp_path, tiny, [{"type": "python", "function": f"{tmp_path / 'mine.py'}:rude"}]), TunesmithError)
    assert "rude" in str(error)


def test_a_reward_model_that_is_nowhere_is_an_error_before_any_stage_is_trained(tiny, tmp_path):
    error = refused(tmp_path, learning(tmp_path, tiny, [{"type": "model", "model": "nowhere"}]), RecipeError)
    assert "`nowhere` is no earlier stage" in str(error)
