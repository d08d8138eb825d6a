"""From rewards to advantages: what is computed over all of an iteration's rollouts, before their windows, since it does not add up.

Arrays of numpy. Per-token arrays are flat, [S] in the forest's order, with each answer's number of tokens in lengths_N; an answer is
never empty. A reward that is NaN is an answer that could not be scored: it gets advantage 0, and its siblings' means do not see it.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

DEVIATION_FLOOR = 1e-4  # added to a deviation that rewards are divided by, as in the papers' code and TRL
SPREAD_FLOOR = 1e-9  # relative to the largest reward; less is rounding of sums, not spread
ERROR_LIMIT = 0.2  # Ziegler et al. 2019 clip the controller's proportional error to this


class GroupAdvantages(NamedTuple):
    """Advantages of answers in groups."""

    advantages_NG: np.ndarray
    """[N, G] float64, 0 where the reward is NaN or the group has no spread."""
    no_spread_N: np.ndarray
    """[N] bool, groups that teach nothing: all scorable rewards are equal, or fewer than two are scorable."""


def group_advantages(rewards_NG: np.ndarray, scale: Literal["group", "batch", "none"]) -> GroupAdvantages:
    """A = (r - mean of its group) / (deviation + 1e-4): Shao et al. 2024, arXiv:2402.03300, section 4.1.2.

    scale: the deviation is the group's, the whole batch's, or none is divided by (arXiv:2503.20783). Deviations are of samples (n - 1).
    """
    rewards_NG = np.asarray(rewards_NG, dtype=np.float64)
    scorable_NG = ~np.isnan(rewards_NG)
    count_N1 = scorable_NG.sum(axis=1, keepdims=True)
    mean_N1 = np.where(scorable_NG, rewards_NG, 0).sum(axis=1, keepdims=True) / np.maximum(count_N1, 1)
    centred_NG = np.where(scorable_NG, rewards_NG - mean_N1, 0)
    no_spread_N = without_spread(rewards_NG)
    if scale == "group":
        deviation = np.sqrt(np.square(centred_NG).sum(axis=1, keepdims=True) / np.maximum(count_N1 - 1, 1)) + DEVIATION_FLOOR
    elif scale == "batch":
        scorable = rewards_NG[scorable_NG]
        deviation = (scorable.std(ddof=1) if len(scorable) > 1 else 0.0) + DEVIATION_FLOOR
    else:
        deviation = 1.0
    return GroupAdvantages(np.where(no_spread_N[:, None], 0, centred_NG / deviation), no_spread_N)


def leave_one_out(rewards_NG: np.ndarray) -> GroupAdvantages:
    """A = r - mean of the siblings' rewards: Ahmadian et al. 2024, arXiv:2402.14740, eq. 8 (Kool et al. 2019)."""
    rewards_NG = np.asarray(rewards_NG, dtype=np.float64)
    scorable_NG = ~np.isnan(rewards_NG)
    filled_NG = np.where(scorable_NG, rewards_NG, 0)
    siblings_NG = filled_NG.sum(axis=1, keepdims=True) - filled_NG
    baseline_NG = siblings_NG / np.maximum(scorable_NG.sum(axis=1, keepdims=True) - 1, 1)
    no_spread_N = without_spread(rewards_NG)
    return GroupAdvantages(np.where(scorable_NG & ~no_spread_N[:, None], filled_NG - baseline_NG, 0), no_spread_N)


def sequence_rewards(score: np.ndarray, kl: np.ndarray, kl_coef: float) -> np.ndarray:
    """score - kl_coef * KL of the whole answer, in the shape of `score`: RLOO's reward (arXiv:2402.14740, eq. 3). kl in nats."""
    return np.asarray(score, dtype=np.float64) - kl_coef * np.asarray(kl, dtype=np.float64)


def token_rewards(kl_S: np.ndarray, score_N: np.ndarray, lengths_N: np.ndarray, kl_coef: float) -> np.ndarray:
    """-kl_coef * KL at each token, and the answer's score at its last, [S] float64: Ziegler et al. 2019, arXiv:1909.08593, section 2.

    kl_S: log p - log p_reference of the sampled token, under the policy that sampled. A NaN score makes its answer's last reward NaN.
    """
    rewards_S = -kl_coef * np.asarray(kl_S, dtype=np.float64)
    rewards_S[np.cumsum(lengths_N) - 1] += score_N
    return rewards_S


def gae(rewards_S: np.ndarray, values_S: np.ndarray, lengths_N: np.ndarray, *, gamma: float, lam: float) -> tuple[np.ndarray, np.ndarray]:
    """Generalised advantage estimates and returns, [S] float64 each: Schulman et al. 2015, arXiv:1506.02438, eq. 16.

    delta_t = r_t + gamma V_{t+1} - V_t with V 0 after the last token, A_t = delta_t + gamma lam A_{t+1}, return_t = A_t + V_t.
    An answer with a NaN among its rewards has advantages 0 and its values as returns, so that it teaches nothing.
    """
    values_S = np.asarray(values_S, dtype=np.float64)
    advantages_S = np.zeros(len(values_S))
    end = len(values_S)
    for length in np.asarray(lengths_N)[::-1]:
        start = end - int(length)
        advantage = following = 0.0
        if not np.isnan(rewards_S[start:end]).any():
            for t in range(end - 1, start - 1, -1):
                advantage = rewards_S[t] + gamma * following - values_S[t] + gamma * lam * advantage
                advantages_S[t], following = advantage, values_S[t]
        end = start
    return advantages_S, advantages_S + values_S


def whiten(values: np.ndarray, mask: np.ndarray | None = None, *, shift_mean: bool = True) -> np.ndarray:
    """(x - mean) / sqrt(variance + 1e-8) over what is in the mask, 0 outside it: as in Ouyang et al. 2022's code and TRL.

    mask: bool, in the shape of `values`; None is all. shift_mean: False keeps the mean, which is for rewards.
    """
    values = np.asarray(values, dtype=np.float64)
    mask = np.ones(values.shape, dtype=bool) if mask is None else mask
    inside = values[mask]
    whitened = np.zeros(values.shape)
    if len(inside) < 2:
        whitened[mask] = 0 if shift_mean else inside
        return whitened
    mean = inside.mean()
    whitened[mask] = (inside - mean) / np.sqrt(inside.var(ddof=1) + 1e-8) + (0 if shift_mean else mean)
    return whitened


def adaptive_kl(coef: float, kl: float, target: float, horizon: float, n: int) -> float:
    """The KL coefficient after n more answers, coef * (1 + clip(kl / target - 1, +-0.2) * n / horizon).

    Ziegler et al. 2019, arXiv:1909.08593, section 2.2. kl, target: nats a sequence. horizon: answers.
    """
    return coef * (1 + float(np.clip(kl / target - 1, -ERROR_LIMIT, ERROR_LIMIT)) * n / horizon)


def without_spread(rewards_NG: np.ndarray) -> np.ndarray:
    """Groups whose scorable rewards are all equal, or that have none, [N] bool."""
    scorable_NG = ~np.isnan(rewards_NG)
    high_N = np.where(scorable_NG, rewards_NG, -np.inf).max(axis=1)
    low_N = np.where(scorable_NG, rewards_NG, np.inf).min(axis=1)
    none_N = ~scorable_NG.any(axis=1)
    high_N[none_N] = low_N[none_N] = 0
    return high_N - low_N <= SPREAD_FLOOR * np.maximum(np.maximum(np.abs(high_N), np.abs(low_N)), 1)
