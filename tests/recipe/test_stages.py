"""Settings of a stage that go together or not: what samples answers, what measures a KL, and what stops it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from tunesmith.errors import RecipeError
from tunesmith.recipe import Recipe, load_recipe

REWARDS = [{"type": "regex", "pattern": "x"}]
SAMPLED = {
    "ppo": {"reward_model": "elsewhere/model"},
    "grpo": {"rewards": REWARDS},
    "rloo": {"rewards": REWARDS},
    "online_dpo": {"rewards": REWARDS},
    "best_of_n": {"rewards": REWARDS},
}
FIXED = ["sft", "dpo", "kto", "orpo", "reward"]


def load(kind: str, objective: dict[str, Any] | None = None, **stage: Any) -> Recipe:
    settings = {"type": kind, **SAMPLED.get(kind, {}), **(objective or {})}
    stage = {"name": "learn", "learning_rate": 1e-4, "objective": settings, **stage}
    return load_recipe({"name": "mine", "model": {"name": "tiny"}, "data": {"train": "rows.jsonl"}, "stages": [stage]})


def refused(kind: str, objective: dict[str, Any] | None = None, **stage: Any) -> str:
    with pytest.raises(RecipeError) as raised:
        load(kind, objective, **stage)
    assert raised.value.mend
    return str(raised.value)


TRUNCATED = [{"top_p": 0.9}, {"top_k": 20}]


@pytest.mark.parametrize("rollout", TRUNCATED, ids=["top_p", "top_k"])
@pytest.mark.parametrize(
    ("kind", "objective", "watch"),
    [
        ("ppo", {}, {}),
        ("ppo", {"kl_coef": 0.0}, {}),
        ("rloo", {}, {}),
        ("rloo", {"kl_coef": 0.0}, {}),
        ("grpo", {"kl_coef": 0.1}, {}),
        *((kind, {}, {"max_kl": 5.0}) for kind in ("grpo", "online_dpo", "best_of_n")),
    ],
)
def test_truncated_sampling_is_refused_where_a_kl_is_used(kind, objective, watch, rollout):
    assert "truncated answers have no KL that can be measured" in refused(kind, objective, rollout=rollout, watch=watch)
    load(kind, objective, watch=watch, rollout={"top_p": 1.0, "top_k": 0})


@pytest.mark.parametrize("rollout", TRUNCATED, ids=["top_p", "top_k"])
@pytest.mark.parametrize("kind", ["grpo", "online_dpo", "best_of_n"])
def test_truncated_sampling_is_taken_where_no_kl_is_used(kind, rollout):
    assert load(kind, rollout=rollout).stages[0].rollout.model_dump(include=rollout.keys()) == rollout


def test_a_value_that_is_never_learned_is_refused():
    assert "stages.0.objective.vf_coef" in refused("ppo", {"vf_coef": 0.0})
    load("ppo", {"vf_coef": 1e-3})


@pytest.mark.parametrize(
    "name, settings", [("rollout", {"temperature": 0.7}), ("watch", {"max_kl": 3.0}), ("watch", {"min_distinct_ratio": None})]
)
@pytest.mark.parametrize("kind", FIXED)
def test_settings_of_sampling_are_refused_by_a_stage_that_samples_nothing(kind, name, settings):
    assert f"{name}: {kind} samples no answers; leave {name} out" in refused(kind, **{name: settings})
    load(kind)
    load(kind, **{name: {}})


@pytest.mark.parametrize("kind", SAMPLED)
def test_a_servers_model_without_a_server_is_refused(kind):
    assert "rollout.server_model: there is no rollout.server" in refused(kind, rollout={"server_model": "base"})
    load(kind, rollout={"server_model": "base", "server": "http://localhost:8000"})


@pytest.mark.parametrize("kind", SAMPLED)
def test_accumulation_is_refused_where_an_update_takes_all_rollouts(kind):
    assert "gradient_accumulation_steps: an update takes all its rollouts" in refused(kind, gradient_accumulation_steps=2)


@pytest.mark.parametrize("answers", [{}, {"num_generations": 2}])
def test_more_mini_batches_than_answers_are_refused(answers):
    most = 4 * answers.get("num_generations", 1)
    load("ppo", {"num_mini_batches": most, **answers}, rollout={"prompts_per_step": 4})
    said = refused("ppo", {"num_mini_batches": most + 1, **answers}, rollout={"prompts_per_step": 4})
    assert f"objective.num_mini_batches: {most} answers cannot be cut into {most + 1} parts" in said


@pytest.mark.parametrize("optim", ["adafactor", "muon"])
def test_what_moves_whole_matrices_is_refused_where_a_sharded_base_trains_and_taken_where_an_adapter_does(optim):
    def sharded(*methods: str | None) -> Recipe:
        stages = [{"name": f"stage{i}", "objective": "sft", "optim": optim, "method": method} for i, method in enumerate(methods)]
        for before, stage in pairwise(stages):
            stage["start_from"] = before["name"]
        whole = {"name": "mine", "model": {"name": "tiny"}, "data": {"train": "rows.jsonl"}, "stages": stages}
        return load_recipe(whole | {"launch": {"strategy": "fsdp"}})

    sharded(None)
    sharded("lora", None)
    for methods in (["full"], ["full", None], ["lora", "full"]):
        with pytest.raises(RecipeError, match=rf"stages\.\d\.optim: {optim} moves whole matrices"):
            sharded(*methods)
    load("sft", method="full", optim=optim)


@pytest.mark.parametrize("kind", ["dpo", "kto", "ranking", "ppo", "grpo", "online_dpo", "sft", "reward", "best_of_n"])
def test_dropout_is_refused_where_it_would_be_off_and_an_adapter_that_has_it_may_be_named(kind):
    method = {"type": "lora", "lora_dropout": 0.1}
    if kind in ("sft", "reward", "best_of_n"):
        load(kind, method=method)
    else:
        assert f"method.lora_dropout: {kind} compares log-probabilities" in refused(kind, method=method)
        load(kind, method=method | {"lora_dropout": 0.0})
        load(kind, method=method, start_from="earlier")
