"""From scores to what each objective learns from: which answers, in which updates, with which advantages, by hand where one can."""

from __future__ import annotations

import numpy as np
import pytest
from tests.toys import make_stage
from tests.train.answers import make_source, objective_of

from tunesmith.objectives import gae, token_rewards, whiten
from tunesmith.train.shaping import SHAPINGS, Shaping

NAN = float("nan")


def shaping_of(kind: str, **settings) -> Shaping:
    return Shaping.of(make_stage(objective=objective_of(kind, **settings), rollout={"prompts_per_step": 4}))


def test_a_pair_is_the_best_and_the_worst_of_a_group_next_to_one_another():
    shaping = shaping_of("online_dpo", num_generations=3)
    rewards = np.array([1.0, 3.0, 2.0, 5.0, 5.0, 5.0, NAN, 1.0, 0.0, NAN, NAN, 4.0, NAN, NAN, NAN])
    assert shaping.select(rewards).tolist() == [1, 0, 7, 8]
    assert shaping.together == 2


def test_the_best_of_each_group_that_has_one():
    shaping = shaping_of("best_of_n", num_generations=3)
    assert shaping.select(np.array([1.0, 3.0, 2.0, NAN, NAN, -4.0, NAN, NAN, NAN, 2.0, 2.0, 1.0])).tolist() == [1, 5, 9]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_a_pair_is_never_parted_whatever_the_batch_size(size):
    source = make_source("online_dpo", per_device_train_batch_size=size)
    window = source.window(0)
    assert sum(len(batch.items) for batch in window.batches) == 4
    for batch in window.batches:
        assert batch.item_B.tolist() == np.repeat(np.arange(len(batch.items)), 2).tolist()
        rewards = batch.columns["reward_B"].reshape(-1, 2)
        assert (rewards[:, 0] > rewards[:, 1]).all()
        assert len(batch.columns["reference_B"]) == len(batch.item_B)


@pytest.mark.parametrize("kind", SHAPINGS)
def test_columns_do_not_depend_on_the_batch_size(kind):
    made = []
    for size in (2, 5, 64):
        source = make_source(kind, per_device_train_batch_size=size)
        source.window(0)
        made.append(source.rollouts)
    for other in made[1:]:
        assert [ids.tolist() for ids in other.ids] == [ids.tolist() for ids in made[0].ids]
        for name, rows in made[0].columns.items():
            for mine, theirs in zip(rows, other.columns[name], strict=True):
                np.testing.assert_allclose(mine, theirs, atol=1e-3, err_msg=name)


def test_grpo_advantages_are_of_the_group_and_the_same_at_each_of_an_answers_tokens():
    source = make_source("grpo")
    source.window(0)
    rewards, rows = source.rollouts.row_columns["reward_B"].reshape(-1, 3), source.rollouts.columns["advantage_S"]
    want = (rewards - rewards.mean(axis=1, keepdims=True)) / (rewards.std(axis=1, ddof=1, keepdims=True) + 1e-4)
    np.testing.assert_allclose([row[0] for row in rows], want.reshape(-1), atol=1e-9)
    assert all((row == row[0]).all() for row in rows)
    assert np.abs(want).max() > 0.5


def test_rloo_takes_the_kl_of_the_whole_answer_off_its_reward():
    plain, held = (make_source(objective_of("rloo", kl_coef=coefficient)) for coefficient in (0.0, 0.5))
    for source in (plain, held):
        source.window(0)
        rollouts = source.rollouts
        kl = [float((old - ref).sum()) for old, ref in zip(rollouts.columns["old_S"], rollouts.columns["reference_S"], strict=True)]
        rewards = (rollouts.row_columns["reward_B"] - source.stage.objective.kl_coef * np.array(kl)).reshape(-1, 3)
        others = (rewards.sum(axis=1, keepdims=True) - rewards) / 2
        np.testing.assert_allclose([row[0] for row in rollouts.columns["advantage_S"]], (rewards - others).reshape(-1), atol=1e-6)


@pytest.mark.parametrize("penalty", [0.0, 2.0])
@pytest.mark.parametrize("whitened", [False, True])
def test_ppo_shapes_by_token_rewards_gae_and_whitening_over_the_whole_iteration(penalty, whitened):
    settings = {"missing_eos_penalty": penalty, "whiten_rewards": whitened, "kl_coef": 0.3, "gamma": 0.9, "lam": 0.8}
    source = make_source(objective_of("ppo", **settings), prompts=8, rollout={"prompts_per_step": 8})
    source.window(0)
    rollouts = source.rollouts
    old, reference, values = (np.concatenate(rollouts.columns[name]) for name in ("old_S", "reference_S", "old_value_S"))
    lengths = np.array([len(row) for row in rollouts.columns["old_S"]])
    score = rollouts.row_columns["reward_B"] - penalty * (1 - rollouts.row_columns["finished_B"].astype(float))
    if whitened:
        score = (score - score.mean()) / np.sqrt(score.var(ddof=1) + 1e-8) + score.mean()
    advantages, returns = gae(token_rewards(old - reference, score, lengths, 0.3), values, lengths, gamma=0.9, lam=0.8)
    np.testing.assert_allclose(np.concatenate(rollouts.columns["return_S"]), returns, atol=1e-9)
    np.testing.assert_allclose(np.concatenate(rollouts.columns["advantage_S"]), whiten(advantages), atol=1e-9)
    assert np.abs(values).max() > 0.01


@pytest.mark.parametrize("answers, parts, size", [(9, 4, 2), (9, 4, 64), (8, 2, 1), (5, 5, 3)])
def test_each_pass_of_ppo_takes_every_answer_once_in_parts_of_like_size_and_an_order_of_its_own(answers, parts, size):
    objective = objective_of("ppo", num_ppo_epochs=4, num_mini_batches=parts)
    source = make_source(objective, prompts=answers, rollout={"prompts_per_step": answers}, per_device_train_batch_size=size)
    assert source.updates == 4 * parts
    orders = []
    for epoch in range(4):
        windows = [source.window(parts * epoch + part).batches for part in range(parts)]
        rows = [[item for batch in window for item in batch.items] for window in windows]
        assert {len(part) for part in rows} <= {answers // parts, -(-answers // parts)}
        assert sorted(item for part in rows for item in part) == list(range(answers))
        assert all(len(batch.items) <= size for window in windows for batch in window)
        orders.append(rows)
    assert len({str(order) for order in orders}) > 1
    assert source.rollouts.iteration == 0


def test_the_kl_coefficient_moves_towards_its_target_and_stays_where_there_is_none():
    moving, still = shaping_of("ppo", target_kl=1.0, kl_coef=0.1), shaping_of("ppo", kl_coef=0.1)
    for shaping in (moving, still):
        shaping.see({"kl": 50.0})
    assert moving.kl_coef == pytest.approx(0.1 * (1 + 0.2 * 4 / 10_000))
    assert still.kl_coef == 0.1
    moving.see({"kl": 0.0})
    assert moving.kl_coef == pytest.approx(0.1 * (1 + 0.2 * 4 / 10_000) * (1 - 0.2 * 4 / 10_000))
    again = shaping_of("ppo", target_kl=1.0, kl_coef=0.1)
    again.load(moving.state())
    assert again.kl_coef == moving.kl_coef


def test_the_best_answers_reward_is_logged_beside_the_mean():
    window = make_source("best_of_n").window(0)
    assert window.metrics["reward_best"] > window.metrics["reward"]
