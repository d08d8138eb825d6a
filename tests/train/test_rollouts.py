"""Rollouts: drawn from the seed alone, measured as they are trained on, scored or left out, and stopped where they go astray."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tests.toys import loaded, make_job, tiny_model
from tests.train.answers import Sampler, make_policy, make_source, mean_token, objective_of

from tunesmith.errors import RolloutFailed
from tunesmith.generate.protocol import Sampling
from tunesmith.models.policy import Policy
from tunesmith.objectives import OBJECTIVES
from tunesmith.rundir import RunDirectory
from tunesmith.train.loop import train
from tunesmith.train.samplers import LocalSampler
from tunesmith.train.window import run_window

SAMPLED = ["ppo", "grpo", "rloo", "online_dpo", "best_of_n"]
SAMPLINGS = {
    "plain": {},
    "cool": {"temperature": 0.7},
    "hot": {"temperature": 1.3},
    "top_p": {"top_p": 0.8},
    "top_k": {"top_k": 5},
    "all": {"temperature": 0.7, "top_p": 0.9, "top_k": 20},
}


def answers_of(source) -> list[list[int]]:
    return [ids.tolist() for ids in source.rollouts.ids]


def test_rollouts_are_a_function_of_weights_seed_and_iteration_and_not_of_the_batch():
    made = {}
    for name, settings in {
        "first": {},
        "again": {},
        "other batches": {"per_device_train_batch_size": 7},
        "other seed": {"seed": 1},
    }.items():
        source = make_source(**settings)
        made[name] = []
        for step in range(2):
            source.window(step)
            made[name].append(answers_of(source))
    assert made["again"] == made["first"] == made["other batches"]
    assert made["other seed"] != made["first"]
    assert made["first"][0] != made["first"][1]
    late = make_source()
    late.window(1)  # as a resumed run begins
    assert answers_of(late) == made["first"][1]


def test_the_answers_of_a_group_differ_and_each_prompt_is_asked_once_a_pass():
    source = make_source(prompts=8)
    asked = []
    for step in range(2):
        source.window(step)
        for group in np.split(np.array([str(row) for row in answers_of(source)]), 4):
            assert len(set(group)) == 3
        asked += prompts_asked(source)
    assert sorted(asked) == sorted(prompt.ids.tolist() for prompt in source.prompts)
    assert source.steps_per_epoch == 2


class Seeds(Sampler):
    """Remembers the seeds that it is given."""

    def __init__(self, policy):
        super().__init__(policy)
        self.seeds = []

    def __call__(self, prompts, *, seeds, **given):
        self.seeds += seeds
        return super().__call__(prompts, seeds=seeds, **given)


def test_every_answer_of_training_and_evaluation_has_a_stream_of_its_own():
    policy, seeds = make_policy(), []
    for seed in (0, 1):
        sampler = Seeds(policy)
        source = make_source(policy=policy, sampler=sampler, seed=seed)
        source.held_out = source.prompts[:3]
        source.window(0), source.window(1), source.evaluate(lambda: None)
        seeds += sampler.seeds
    assert len(seeds) == 2 * (2 * 12 + 3) == len(set(seeds))


@pytest.mark.parametrize("prompts, steps", [(2, 1), (5, 4)], ids=["fewer prompts than a step asks", "the seam of two passes"])
def test_a_prompt_that_is_asked_twice_in_an_iteration_gets_other_answers(prompts, steps):
    source = make_source(prompts=prompts, rollout={"max_new_tokens": 12})
    seen = 0
    for step in range(steps):
        source.window(step)
        made = [str(row) for row in answers_of(source)]
        assert len(set(made)) == len(made) == 12
        seen += len({str(prompt) for prompt in prompts_asked(source)}) < 4
    assert seen, "no iteration asked a prompt twice"


def prompts_asked(source) -> list[list[int]]:
    """The prompt of each group of three."""
    return [answers_of(source)[row][: source.rollouts.prompt_lengths[row]] for row in range(0, 12, 3)]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_before_the_first_update_every_ratio_is_1_under_every_sampling_setting(sampling):
    source = make_source(rollout=SAMPLINGS[sampling] | {"max_mismatch": 0.01})
    window = source.window(0)
    for batch in window.batches:
        with torch.no_grad():
            now = source.parts.policy(batch.forest).logprobs.numpy()
        ratio = np.exp(now - batch.columns["old_S"])
        assert np.abs(ratio - 1).max() <= 1e-5
        np.testing.assert_allclose(batch.columns["correction_S"], 1, atol=0.01)
    assert window.metrics["mismatch"] <= 1e-4
    result = run_window(source.parts.policy, OBJECTIVES["grpo"](source.stage.objective), window.batches)
    assert result.metrics["ratio"] == pytest.approx(1, abs=0.01)
    assert result.metrics["clip_ratio/region_mean"] == 0
    assert result.metrics["policy_kl"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("kind", ["ppo", "grpo", "rloo"])
def test_at_a_learning_rate_of_almost_0_ratios_stay_1_through_the_loop(tmp_path, kind):
    rollout = {"temperature": 0.7} | ({"top_p": 0.9} if kind == "grpo" else {})
    policy = make_policy(temperature=0.7, changed=0.0)
    source = make_source(objective_of(kind), policy=policy, rollout=rollout, max_steps=4, learning_rate=1e-12, save_steps=9)
    with RunDirectory.open(tmp_path / "run", resume=False) as run:
        train(make_job(source.parts.policy, source.stage, run, [], objective=OBJECTIVES[kind](source.stage.objective), source=source))
        lines = [event for event in run.events() if "loss" in event]
    assert len(lines) == 4
    for line in lines:
        assert line["ratio"] == pytest.approx(1, abs=0.01)
        assert line["mismatch"] < 1e-4
        assert ("kl" in line) == (kind != "grpo")


@pytest.mark.parametrize("kind", ["grpo", "online_dpo", "best_of_n"])
@pytest.mark.parametrize("sampling", ["top_p", "top_k", "all"])
def test_answers_of_a_truncated_distribution_have_no_kl_in_the_log(kind, sampling):
    source = make_source(objective_of(kind), rollout=SAMPLINGS[sampling])
    window = source.window(0)
    result = run_window(source.parts.policy, OBJECTIVES[kind](source.stage.objective), window.batches)
    assert not [name for name in (*window.metrics, *result.metrics) if name in ("kl", "kl_k3")]
    full = make_source(objective_of(kind))
    assert full.window(0).metrics["kl"] != 0


@pytest.mark.parametrize("wrong", ["temperature", "log-probabilities", "not a number"])
def test_a_sampler_and_a_trainer_that_differ_by_more_than_their_band_end_the_run(wrong):
    if wrong == "temperature":  # the policy trains at another temperature than it samples at
        source = make_source(policy=make_policy(temperature=1.0), rollout={"temperature": 0.5, "max_mismatch": 0.2})
    else:
        policy = make_policy()
        value = 0.3 if wrong == "log-probabilities" else float("nan")
        sampler = Sampler(policy, lambda logprobs: [one + value for one in logprobs])
        source = make_source(policy=policy, sampler=sampler, rollout={"max_mismatch": 0.2})
    with pytest.raises(RolloutFailed, match="sampler and trainer differ"):
        source.window(0)


@pytest.mark.parametrize("cap, shift, want", [(2.0, -0.1, np.exp(0.1)), (1.05, -0.1, 1.05), (None, -0.1, 1.0), (2.0, 0.1, np.exp(-0.1))])
def test_within_the_band_a_token_is_weighed_by_trainer_over_sampler_up_to_the_cap(cap, shift, want):
    policy = make_policy()
    sampler = Sampler(policy, lambda logprobs: [one + shift for one in logprobs])
    window = make_source(policy=policy, sampler=sampler, rollout={"importance_cap": cap}).window(0)
    for batch in window.batches:
        np.testing.assert_allclose(batch.columns["correction_S"], want, rtol=1e-3)
    assert window.metrics["mismatch"] == pytest.approx(0.1, rel=1e-2)


def one_in_three_fails(answers) -> list[float]:
    rewards = mean_token(answers)
    return [float("nan") if i % 3 == i // 3 % 3 else reward for i, reward in enumerate(rewards)]


@pytest.mark.parametrize("kind", SAMPLED)
def test_where_one_answer_in_three_has_no_score_it_teaches_nothing_and_its_siblings_are_not_biased(kind):
    source = make_source(objective_of(kind, num_generations=3), reward=one_in_three_fails)
    window = source.window(0)
    rollouts = source.rollouts
    assert window.metrics["unscorable"] == 4
    assert np.isfinite(rollouts.row_columns["reward_B"]).all()
    assert len(rollouts.ids) == {"best_of_n": 4}.get(kind, 8)
    assert all(np.isfinite(values).all() for batch in window.batches for values in batch.columns.values())
    if kind in ("grpo", "rloo"):
        rewards, advantages = rollouts.row_columns["reward_B"], np.array([row[0] for row in rollouts.columns["advantage_S"]])
        for group in np.split(np.arange(8), 4):
            assert advantages[group].sum() == pytest.approx(0, abs=1e-9)
        if kind == "grpo":
            first, second = rewards[:2]
            want = (first - second) / 2 / (abs(first - second) / np.sqrt(2) + 1e-4) if first != second else 0.0
            np.testing.assert_allclose(advantages[:2], [want, -want], atol=1e-9)
    result = run_window(source.parts.policy, OBJECTIVES[kind](source.stage.objective), window.batches)
    assert np.isfinite(result.loss)


def test_a_run_of_which_too_many_answers_have_no_score_ends():
    make_source(reward=one_in_three_fails, rollout={"max_unscorable": 0.34}).window(0)
    with pytest.raises(RolloutFailed, match="33% of the answers cannot be scored: it broke"):
        make_source(reward=one_in_three_fails, rollout={"max_unscorable": 0.33}).window(0)
    with pytest.raises(RolloutFailed, match="100% of the answers cannot be scored"):
        make_source(reward=lambda answers: [float("nan")] * len(answers), rollout={"max_unscorable": 1.0}).window(0)


def test_an_evaluation_leaves_training_as_it_was():
    sources = [make_source("ppo"), make_source("ppo")]
    for source in sources:
        source.window(0)
    measured = sources[0]
    policy = measured.parts.policy
    state, rng = {name: tensor.clone() for name, tensor in measured.state().items()}, torch.get_rng_state()
    training = [module.training for module in policy.modules()]
    held = copy.deepcopy(policy.state_dict())
    first, second = measured.evaluate(lambda: None), measured.evaluate(lambda: None)
    assert first == second
    assert first.loss == -first.metrics["reward"]
    assert len(first.samples) == 3
    assert measured.state().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in measured.state().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert [module.training for module in policy.modules()] == training
    assert all(torch.equal(tensor, held[name]) for name, tensor in policy.state_dict().items())
    assert all(parameter.grad is None for parameter in policy.parameters())
    for step in range(1, 3):
        one, other = (source.window(step) for source in sources)
        assert one.metrics == other.metrics
        assert [batch.forest.tokens_T.tolist() for batch in one.batches] == [batch.forest.tokens_T.tolist() for batch in other.batches]


def test_an_evaluation_tells_how_many_answers_it_is_of_and_ends_the_run_where_too_many_have_no_score():
    def first_fails(answers) -> list[float]:
        return [float("nan"), *mean_token(answers)[1:]]

    result = make_source(reward=first_fails).evaluate(lambda: None)
    assert (result.metrics["n"], result.metrics["unscorable"]) == (2, 1)
    assert result.loss == -result.metrics["reward"] == -np.mean([sample["reward"] for sample in result.samples[1:]])
    assert result.samples[0]["reward"] is None
    whole = make_source().evaluate(lambda: None).metrics
    assert (whole["n"], whole["unscorable"]) == (3, 0)
    with pytest.raises(RolloutFailed, match="33% of the answers cannot be scored: it broke") as raised:
        make_source(reward=first_fails, rollout={"max_unscorable": 0.3}).evaluate(lambda: None)
    assert "the held-out prompts" in raised.value.where
    with pytest.raises(RolloutFailed, match="100% of the answers"):
        make_source(reward=lambda answers: [float("nan")] * 3, rollout={"max_unscorable": 1.0}).evaluate(lambda: None)


def test_a_signal_is_looked_for_between_parts_of_an_evaluation():
    source, looks = make_source(), []
    source.held_out = source.prompts * 3
    source.evaluate(lambda: looks.append(source.parts.sampler.asked))
    assert looks == [0, 1, 2, 3]


@pytest.mark.parametrize("prompts", [4, 5, 1], ids=["12 answers", "15 answers", "3 answers"])
@pytest.mark.parametrize("kind", ["online_dpo", "best_of_n"])
def test_kl_and_entropy_are_of_all_answers_where_some_alone_are_learned_from(kind, prompts):
    rollout = {"prompts_per_step": prompts}
    answers = [make_source(objective_of(name), policy=make_policy(changed=0.3), rollout=rollout) for name in ("grpo", kind)]
    every, some = (source.window(0).metrics for source in answers)
    assert len(answers[1].rollouts.ids) < len(answers[0].rollouts.ids) == 3 * prompts
    for name in ("kl", "entropy", "mismatch", "length"):
        assert some[name] == pytest.approx(every[name], rel=1e-4)


def test_the_gold_measure_is_watched_and_never_learned_from():
    plain = make_source()
    watched = make_source(gold=lambda answers: np.array([7.0] * len(answers)))
    one, other = plain.window(0), watched.window(0)
    assert other.metrics.pop("gold_reward") == 7
    assert one.metrics == other.metrics
    for mine, theirs in zip(one.batches, other.batches, strict=True):
        np.testing.assert_array_equal(mine.columns["advantage_S"], theirs.columns["advantage_S"])
    assert watched.evaluate(lambda: None).metrics["gold_reward"] == 7


def test_kl_to_the_reference_is_0_for_a_fresh_adapter_and_what_two_plain_models_give_after():
    assert make_source(policy=make_policy(changed=0.0)).window(0).metrics["kl"] == pytest.approx(0, abs=1e-5)
    source = make_source(policy=make_policy(changed=0.3))
    window, base = source.window(0), Policy(tiny_model("llama"))
    sums = []
    for batch in window.batches:
        with torch.no_grad():
            apart = source.parts.policy(batch.forest).logprobs - base(batch.forest).logprobs
        sums += np.bincount(batch.forest.row_S, weights=apart.numpy()).tolist()
    assert window.metrics["kl"] == pytest.approx(np.mean(sums), rel=1e-3)
    assert abs(window.metrics["kl"]) > 0.05


def test_what_is_left_out_of_the_sampling_is_said_once():
    said: list[str] = []
    policy = Policy(tiny_model("llama"))
    sampler = LocalSampler(policy, loaded(policy.model), [], said.append)
    how = {"max_new_tokens": 2, "sampling": Sampling(1.0), "seeds": [0], "iteration": 0}
    sampler.generator.notes.append("the slow way")
    for _ in range(2):
        sampler([[5, 6, 7]], **how)
    assert said == ["the slow way"]
