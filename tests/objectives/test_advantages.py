"""Rewards become advantages as the papers' formulas say: by hand, against TRL's arithmetic, and with answers that cannot be scored."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from trl.trainer.utils import nanstd

from tunesmith.objectives import adaptive_kl, gae, group_advantages, leave_one_out, sequence_rewards, token_rewards, whiten

RNG = np.random.default_rng(0)
NAN = float("nan")


def test_gae_is_the_discounted_sum_of_temporal_differences_of_each_answer_alone():
    lengths, gamma, lam = np.array([5, 1, 9]), 0.97, 0.9
    rewards, values = RNG.standard_normal(15), RNG.standard_normal(15)
    advantages, returns = gae(rewards, values, lengths, gamma=gamma, lam=lam)
    start = 0
    for length in lengths:
        r, v = rewards[start : start + length], np.append(values[start : start + length], 0.0)
        deltas = r + gamma * v[1:] - v[:-1]
        for t in range(length):
            want = sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, length))
            assert advantages[start + t] == pytest.approx(want, abs=1e-12)
        start += length
    np.testing.assert_allclose(returns, advantages + values)


def test_gae_with_lambda_1_is_the_discounted_return_less_the_value():
    rewards, values = np.array([1.0, 2.0, 4.0]), np.array([10.0, 20.0, 30.0])
    _, returns = gae(rewards, values, np.array([3]), gamma=0.5, lam=1.0)
    assert returns.tolist() == [1 + 0.5 * 2 + 0.25 * 4, 2 + 0.5 * 4, 4]


def test_an_unscorable_answer_has_no_advantage_and_its_own_values_as_returns_and_its_neighbours_do_not_notice():
    lengths, values = np.array([2, 3, 2]), RNG.standard_normal(7)
    rewards = token_rewards(np.zeros(7), np.array([1.0, NAN, 2.0]), lengths, kl_coef=0.1)
    advantages, returns = gae(rewards, values, lengths, gamma=1.0, lam=0.95)
    assert advantages[2:5].tolist() == [0, 0, 0]
    assert returns[2:5].tolist() == values[2:5].tolist()
    alone, _ = gae(np.delete(rewards, [2, 3, 4]), np.delete(values, [2, 3, 4]), np.array([2, 2]), gamma=1.0, lam=0.95)
    assert np.delete(advantages, [2, 3, 4]).tolist() == alone.tolist()


def test_the_kl_is_taken_off_each_token_and_the_score_comes_with_the_last():
    rewards = token_rewards(np.array([1.0, 2.0, 3.0, 4.0]), np.array([10.0, 20.0]), np.array([3, 1]), kl_coef=0.5)
    assert rewards.tolist() == [-0.5, -1.0, 10 - 1.5, 20 - 2.0]
    assert sequence_rewards(np.array([10.0, 20.0]), np.array([6.0, 4.0]), 0.5).tolist() == [7.0, 18.0]


def test_whitened_values_have_mean_0_and_deviation_1_inside_the_mask_and_are_0_outside():
    values, mask = RNG.standard_normal(50) * 3 + 7, RNG.random(50) < 0.7
    white = whiten(values, mask)
    assert white[mask].mean() == pytest.approx(0, abs=1e-12)
    assert white[mask].std(ddof=1) == pytest.approx(1, abs=1e-6)
    assert not white[~mask].any()
    kept = whiten(values, mask, shift_mean=False)
    assert kept[mask].mean() == pytest.approx(values[mask].mean())
    assert kept[mask].std(ddof=1) == pytest.approx(1, abs=1e-6)
    assert whiten(np.array([3.0])).tolist() == [0]
    assert whiten(np.array([3.0]), shift_mean=False).tolist() == [3]


def test_the_kl_coefficient_follows_the_error_which_is_cut_at_a_fifth():
    assert adaptive_kl(0.1, 6.6, 6.0, 1000, 100) == pytest.approx(0.1 * (1 + 0.1 * 0.1))
    assert adaptive_kl(0.1, 60.0, 6.0, 1000, 100) == pytest.approx(0.1 * (1 + 0.2 * 0.1))
    assert adaptive_kl(0.1, 0.0, 6.0, 1000, 100) == pytest.approx(0.1 * (1 - 0.2 * 0.1))
    assert adaptive_kl(0.1, 6.0, 6.0, 1000, 100) == 0.1


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_advantages_are_trls_also_where_one_in_three_cannot_be_scored(scale):
    rewards = RNG.standard_normal((5, 6)) * 4
    rewards[RNG.random((5, 6)) < 1 / 3] = NAN
    flat = torch.from_numpy(rewards).reshape(-1)
    mean = torch.nanmean(flat.view(5, 6), dim=1).repeat_interleave(6)
    deviation = nanstd(flat.view(5, 6), dim=1).repeat_interleave(6) if scale == "group" else nanstd(flat)
    want = flat - mean if scale == "none" else (flat - mean) / (deviation + 1e-4)
    got = group_advantages(rewards, scale)
    np.testing.assert_allclose(got.advantages_NG.ravel(), torch.nan_to_num(want, nan=0.0).numpy(), rtol=1e-5, atol=1e-9)
    assert not got.no_spread_N.any()


@pytest.mark.parametrize("advantages", [lambda r: group_advantages(r, "group"), leave_one_out], ids=["grpo", "rloo"])
def test_an_unscorable_answer_gets_0_and_its_siblings_what_they_would_have_without_it(advantages):
    whole = RNG.standard_normal((3, 4))
    with_gaps = np.insert(whole, 2, NAN, axis=1)
    got, want = advantages(with_gaps), advantages(whole)
    assert not got.advantages_NG[:, 2].any()
    np.testing.assert_allclose(np.delete(got.advantages_NG, 2, axis=1), want.advantages_NG, atol=1e-12)
    zero_filled = advantages(np.nan_to_num(with_gaps))
    assert np.abs(np.delete(zero_filled.advantages_NG, 2, axis=1) - want.advantages_NG).max() > 0.01


@pytest.mark.parametrize("advantages", [lambda r: group_advantages(r, "group"), lambda r: group_advantages(r, "batch"), leave_one_out])
def test_a_group_without_spread_gets_0_and_is_counted(advantages):
    third = 0.1 + 0.2  # a hair from 0.3: the sum of weighted rewards in another order
    rewards = np.array([[1.0, 1, 1], [NAN, NAN, NAN], [2, NAN, NAN], [0.3, third, 0.3], [0, 1, 0]])
    got = advantages(rewards)
    assert got.no_spread_N.tolist() == [True, True, True, True, False]
    assert not got.advantages_NG[:4].any()
    assert got.advantages_NG[4].all()
    assert np.isfinite(got.advantages_NG).all()


def test_leave_one_out_subtracts_the_mean_of_the_others():
    got = leave_one_out(np.array([[1.0, 2, 6], [0, NAN, 4]])).advantages_NG
    np.testing.assert_allclose(got, [[1 - 4, 2 - 3.5, 6 - 1.5], [-4, 0, 4]])
