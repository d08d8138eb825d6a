"""Groups whose answers are all as good: counted, replaced if that is asked for, never learned from; an error where there are no others."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from tests.toys import make_job
from tests.train.answers import make_policy, make_source, mean_token, objective_of

from tunesmith.errors import InvariantViolated, RolloutFailed
from tunesmith.objectives import OBJECTIVES
from tunesmith.rundir import RunDirectory
from tunesmith.train.loop import train


def answers_of(source) -> list[list[int]]:
    return [ids.tolist() for ids in source.rollouts.ids]


def dull(*numbers: int):
    """A reward that is the same for every answer to some prompts."""

    def reward(answers) -> list[float]:
        return [0.5 if int(answer.prompt.record.row_id.split("-")[1]) in numbers else float(i) for i, answer in enumerate(answers)]

    return reward


@pytest.mark.parametrize("kind", ["grpo", "rloo", "online_dpo"])
def test_groups_without_spread_are_counted_and_teach_nothing(kind):
    source = make_source(objective_of(kind, kl_coef=0.0) if kind != "online_dpo" else objective_of(kind), reward=dull(0, 1, 2), prompts=4)
    window = source.window(0)
    assert window.metrics["groups_without_spread"] == 3
    if kind == "online_dpo":
        assert len(source.rollouts.ids) == 2
    else:
        advantages = np.array([row[0] for row in source.rollouts.columns["advantage_S"]])
        assert np.count_nonzero(advantages.reshape(-1, 3).any(axis=1)) == 1


def state_of(job) -> dict[str, torch.Tensor]:
    """Weights and optimiser state, copied."""
    return {name: tensor.clone() for name, tensor in job.optimiser.state().items()}


def learn(tmp_path, kind: str, reward, **settings):
    """A stage by the loop, from a fresh adapter with weight decay: (job, progress or error, states before each update and at the end)."""
    policy = make_policy(changed=0.0)
    stage = {"max_steps": 3, "weight_decay": 0.1, "warmup_steps": 0, "save_steps": 9} | settings
    source = make_source(SPREADING[kind], policy=policy, reward=reward, **stage)
    states, plain = [], source.window
    with RunDirectory.open(tmp_path / "run", resume=False) as run:
        job = make_job(policy, source.stage, run, [], objective=OBJECTIVES[kind](source.stage.objective), source=source)
        source.window = lambda step: states.append(state_of(job)) or plain(step)
        try:
            ended = train(job)
        except InvariantViolated as error:
            ended = error
        return job, ended, [*states, state_of(job)], list(run.events())


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


SPREADING = {"grpo": objective_of("grpo"), "rloo": objective_of("rloo", kl_coef=0.0), "online_dpo": objective_of("online_dpo")}


def alike_at(*iterations: int):
    """A reward that is the same for all answers of some iterations; `mean_token` in the others."""
    asked = []

    def reward(answers) -> list[float]:
        asked.append(answers)
        return [0.5] * len(answers) if len(asked) - 1 in iterations else mean_token(answers)

    return reward


@pytest.mark.parametrize("kind", SPREADING)
def test_an_iteration_without_spread_makes_no_update_wherever_it_comes(tmp_path, kind):
    _, progress, states, events = learn(tmp_path, kind, alike_at(0, 2), max_steps=4)
    assert progress.step == 4
    assert [same(one, other) for one, other in pairwise(states)] == [True, False, True, False]
    assert [event["step"] for event in events if event.get("event") == "nothing_learned"] == [1, 3]
    assert [event["step"] for event in events if "loss" in event] == [2, 4]
    assert all(event["groups_without_spread"] == 4 for event in events if event.get("event") == "nothing_learned")


@pytest.mark.parametrize("kind", SPREADING)
def test_a_stage_none_of_whose_updates_had_a_gradient_ends_with_an_error(tmp_path, kind):
    _, error, states, events = learn(tmp_path, kind, alike_at(*range(9)))
    assert isinstance(error, InvariantViolated)
    assert "nothing was learned: none of 3 updates had a gradient" in str(error)
    assert error.mend
    assert all(same(state, states[0]) for state in states)
    assert len([event for event in events if event.get("event") == "nothing_learned"]) == 3


def test_a_fresh_adapter_whose_first_iteration_is_without_spread_is_not_taken_for_one_that_gets_no_gradient(tmp_path):
    policy = make_policy(changed=0.0)
    objective = objective_of(
        "grpo", num_iterations=2, kl_coef=0.1
    )  # with a KL every iteration is learned from, though it pulls nowhere yet
    source = make_source(objective, policy=policy, reward=alike_at(0), max_steps=6, warmup_steps=0)
    with RunDirectory.open(tmp_path / "run", resume=False) as run:
        progress = train(make_job(policy, source.stage, run, [], objective=OBJECTIVES["grpo"](source.stage.objective), source=source))
        norms = [event["grad_norm"] for event in run.events() if "loss" in event]
    assert norms[:2] == pytest.approx([0, 0], abs=1e-4)
    assert max(norms[2:]) > 0.01
    assert progress.saw_gradients


def test_a_start_that_is_not_the_reference_ends_the_stage_though_it_is_what_sampled(tmp_path):
    policy = make_policy(changed=0.3)
    source = make_source(objective_of("grpo", kl_coef=0.1), policy=policy, max_steps=2)
    with RunDirectory.open(tmp_path / "run", resume=False) as run:
        job = make_job(policy, source.stage, run, [], objective=OBJECTIVES["grpo"](source.stage.objective), source=source)
        with pytest.raises(InvariantViolated, match="nats a token away from the reference, not at it"):
            train(job)


def test_the_start_is_compared_before_the_first_update_also_where_windows_without_one_came_before(tmp_path):
    source = make_source(objective_of("grpo", kl_coef=0.1), policy=(policy := make_policy(changed=0.3)), max_steps=3)
    plain = source.window
    source.window = lambda step: replace(plain(step), batches=[]) if step == 0 else plain(step)
    with RunDirectory.open(tmp_path / "run", resume=False) as run:
        job = make_job(policy, source.stage, run, [], objective=OBJECTIVES["grpo"](source.stage.objective), source=source)
        with pytest.raises(InvariantViolated, match="nats a token away from the reference, not at it"):
            train(job)


@pytest.mark.parametrize("times", [0, 1, 4])
def test_dynamic_sampling_replaces_groups_without_spread_by_other_prompts(times):
    settings = {"reward": dull(0, 1, 2, 3), "prompts": 12, "rollout": {"prompts_per_step": 12}}
    source = make_source(objective_of("grpo", dynamic_sampling=times), **settings)
    window = source.window(0)
    left = window.metrics["groups_without_spread"]
    assert window.metrics.get("sampled_again", 0) >= 3 * (4 - left)
    assert ("sampled_again" in window.metrics) == (times > 0)
    assert left == 4 if times == 0 else left < 4 if times == 1 else left == 0
    rewards = source.rollouts.row_columns["reward_B"].reshape(-1, 3)
    assert np.count_nonzero(rewards.std(axis=1) == 0) == left
    groups = np.array([str(row[:length]) for row, length in zip(source.rollouts.ids, source.rollouts.prompt_lengths, strict=True)])
    assert all(len(set(group)) == 1 for group in groups.reshape(-1, 3))  # a group is of one prompt still
    assert sum(str(prompt.ids) in groups for prompt in source.prompts[:4]) == left  # the answers are replaced with their scores
    assert len({str(answers_of(source)[i : i + 3]) for i in range(0, 36, 3)}) == 12  # of a prompt asked already, these are other answers
    again = make_source(objective_of("grpo", dynamic_sampling=times), **settings)
    again.window(0)
    assert answers_of(again) == answers_of(source)


def test_answers_without_a_score_are_counted_over_all_that_was_sampled_with_the_reasons():
    def fails_where_dull(answers) -> list[float]:
        dull = [int(answer.prompt.record.row_id.split("-")[1]) < 4 for answer in answers]
        return [float("nan") if flat else float(i) for i, flat in enumerate(dull)]

    settings = {"reward": fails_where_dull, "prompts": 12, "rollout": {"prompts_per_step": 12, "max_unscorable": 0.9}}
    source = make_source(objective_of("grpo", dynamic_sampling=4), **settings)
    metrics = source.window(0).metrics
    assert np.isfinite(source.rollouts.row_columns["reward_B"]).all()
    assert len(source.rollouts.ids) == 36  # each group that failed was replaced by one that did not
    assert metrics["unscorable"] >= 12
    assert metrics["unscorable_because"] == "it broke"
    share = metrics["unscorable"] / (36 + metrics["sampled_again"])
    with pytest.raises(RolloutFailed, match=f"{share:.0%} of the answers"):
        make_source(
            objective_of("grpo", dynamic_sampling=4), **settings | {"rollout": settings["rollout"] | {"max_unscorable": 0.2}}
        ).window(0)
    assert "unscorable_because" not in make_source().window(0).metrics


def test_the_reason_of_an_answer_that_was_sampled_to_replace_a_group_is_told_too():
    asked = []

    def later_fails(answers) -> list[float]:
        asked.append(answers)
        return [0.5] * 12 if len(asked) == 1 else [float("nan"), *mean_token(answers)[1:]]

    metrics = make_source(objective_of("grpo", dynamic_sampling=1), reward=later_fails).window(0).metrics
    assert (metrics["unscorable"], metrics["unscorable_because"]) == (1, "it broke")
