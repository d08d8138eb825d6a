"""From scored answers to what each objective learns from: which answers, in which updates, with which columns. One class each.

Everything here is computed over a whole iteration, before its windows, since none of it adds up over batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ..data.batching import Batch
from ..generate.sampling import stream_seed
from ..objectives import adaptive_kl, gae, group_advantages, leave_one_out, sequence_rewards, token_rewards, whiten, without_spread
from ..recipe import Stage
from .buffer import Rollouts

KL_HORIZON = 10_000  # answers over which an adaptive coefficient moves; Ziegler et al. 2019


@dataclass(frozen=True)
class Shaped:
    """columns: by name, one array an answer. row_columns: by name, [N]. metrics: for the log. learns: whether anything can be learned."""

    columns: Mapping[str, list[np.ndarray]] = field(default_factory=dict)
    row_columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    learns: bool = True


class Shaping:
    """What is common: groups of answers to one prompt, the passes over them, and nothing to remember.

    group: answers of a prompt. passes: over an iteration's answers, each cut into `parts`, an update each. together: rows that may not be
    parted. values: whether there is a value head.
    """

    together = 1
    values = False
    dynamic_sampling = 0

    def __init__(self, stage: Stage):
        self.settings = stage.objective
        self.group: int = stage.objective.num_generations
        self.passes, self.parts = 1, 1

    @staticmethod
    def of(stage: Stage) -> Shaping:
        """The shaping of a stage's objective."""
        return SHAPINGS[stage.objective.type](stage)

    @property
    def updates(self) -> int:
        """Windows of an iteration."""
        return self.passes * self.parts

    def part(self, parts: Sequence[list[Batch]], within: int, seed: int, iteration: int) -> list[Batch]:
        """The batches of update `within` of an iteration: a part of a pass, in the pass's own order."""
        epoch, part = divmod(within, self.parts)
        order = np.random.default_rng(stream_seed(seed, "mini-batches", iteration, epoch)).permutation(self.parts)
        return parts[order[part]]

    def select(self, rewards_N: np.ndarray) -> np.ndarray:
        """The answers that are learned from: those that could be scored."""
        return np.flatnonzero(np.isfinite(rewards_N))

    def columns(self, rollouts: Rollouts, rewards_N: np.ndarray, rows: np.ndarray) -> Shaped:
        """What the objective reads of the chosen rows; rewards are those of all answers."""
        return Shaped()

    def see(self, metrics: Mapping[str, float]) -> None:
        """Remembers what the next iteration needs."""

    def state(self) -> dict[str, torch.Tensor]:
        """What is remembered, for a checkpoint."""
        return {}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes it up again."""


class PPOShaping(Shaping):
    """Rewards token by token, less the KL; GAE; whitened advantages; a coefficient that may adapt."""

    values = True

    def __init__(self, stage: Stage):
        super().__init__(stage)
        self.passes, self.parts = self.settings.num_ppo_epochs, self.settings.num_mini_batches
        self.kl_coef = self.settings.kl_coef
        self.answers = stage.rollout.prompts_per_step * self.group

    def columns(self, rollouts: Rollouts, rewards_N: np.ndarray, rows: np.ndarray) -> Shaped:
        """advantage_S and return_S."""
        settings, old, reference = self.settings, rollouts.columns["old_S"], rollouts.columns["reference_S"]
        score = rewards_N[rows] - settings.missing_eos_penalty * ~rollouts.row_columns["finished_B"]
        if settings.whiten_rewards:
            score = whiten(score, shift_mean=False)
        lengths = np.array([len(row) for row in old])
        rewards = token_rewards(np.concatenate(old) - np.concatenate(reference), score, lengths, self.kl_coef)
        advantages, returns = gae(rewards, np.concatenate(rollouts.columns["old_value_S"]), lengths, gamma=settings.gamma, lam=settings.lam)
        cuts = np.cumsum(lengths)[:-1]
        columns = {"advantage_S": np.split(whiten(advantages), cuts), "return_S": np.split(returns, cuts)}
        return Shaped(columns, metrics={"kl_coef": self.kl_coef})

    def see(self, metrics: Mapping[str, float]) -> None:
        """Moves the coefficient towards the KL that is aimed at."""
        if self.settings.target_kl is not None:
            self.kl_coef = adaptive_kl(self.kl_coef, metrics["kl"], self.settings.target_kl, KL_HORIZON, self.answers)

    def state(self) -> dict[str, torch.Tensor]:
        """The coefficient."""
        return {"kl_coef": torch.tensor(self.kl_coef, dtype=torch.float64)}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """The coefficient."""
        self.kl_coef = float(state["kl_coef"]) if "kl_coef" in state else self.settings.kl_coef


class GRPOShaping(Shaping):
    """Advantages relative to the group."""

    def __init__(self, stage: Stage):
        super().__init__(stage)
        self.passes, self.dynamic_sampling = self.settings.num_iterations, self.settings.dynamic_sampling

    def columns(self, rollouts: Rollouts, rewards_N: np.ndarray, rows: np.ndarray) -> Shaped:
        """advantage_S, the same at each token of an answer."""
        found = group_advantages(rewards_N.reshape(-1, self.group), self.settings.scale_rewards)
        return Shaped(
            {"advantage_S": _spread(found.advantages_NG.reshape(-1)[rows], rollouts.columns["old_S"])},
            metrics={"groups_without_spread": float(found.no_spread_N.sum())},
            learns=self.settings.kl_coef > 0 or not found.no_spread_N.all(),
        )


class RLOOShaping(Shaping):
    """Rewards less the KL of the whole answer, against the mean of the siblings'."""

    def __init__(self, stage: Stage):
        super().__init__(stage)
        self.passes = self.settings.num_iterations

    def columns(self, rollouts: Rollouts, rewards_N: np.ndarray, rows: np.ndarray) -> Shaped:
        """advantage_S, the same at each token of an answer."""
        old, reference = rollouts.columns["old_S"], rollouts.columns["reference_S"]
        rewards = np.full(len(rewards_N), np.nan)
        kl = np.array([(mine - theirs).sum() for mine, theirs in zip(old, reference, strict=True)])
        rewards[rows] = sequence_rewards(rewards_N[rows], kl, self.settings.kl_coef)
        found = leave_one_out(rewards.reshape(-1, self.group))
        return Shaped(
            {"advantage_S": _spread(found.advantages_NG.reshape(-1)[rows], old)},
            metrics={"groups_without_spread": float(found.no_spread_N.sum())},
            learns=not found.no_spread_N.all(),
        )


class PairShaping(Shaping):
    """The best and the worst of a group as a pair; a group without spread gives none."""

    together = 2

    def select(self, rewards_N: np.ndarray) -> np.ndarray:
        """Best and worst of each group, next to one another."""
        chosen: list[int] = []
        for start in range(0, len(rewards_N), self.group):
            rewards = rewards_N[start : start + self.group]
            known = np.flatnonzero(np.isfinite(rewards))
            if not without_spread(rewards[None])[0]:
                chosen += [start + int(known[rewards[known].argmax()]), start + int(known[rewards[known].argmin()])]
        return np.array(chosen, dtype=np.int64)

    def columns(self, rollouts: Rollouts, rewards_N: np.ndarray, rows: np.ndarray) -> Shaped:
        """reference_B."""
        reference = np.array([row.sum(dtype=np.float64) for row in rollouts.columns["reference_S"]])
        groups = len(rewards_N) // self.group
        dull = float(groups - len(rows) // 2)
        return Shaped(row_columns={"reference_B": reference}, metrics={"groups_without_spread": dull}, learns=len(rows) > 0)


class BestShaping(Shaping):
    """The best of each group."""

    def select(self, rewards_N: np.ndarray) -> np.ndarray:
        """The best of each group that has one."""
        groups = np.where(np.isfinite(rewards_N), rewards_N, -np.inf).reshape(-1, self.group)
        best = groups.argmax(axis=1) + np.arange(len(groups)) * self.group
        return best[np.isfinite(groups).any(axis=1)]

    def columns(self, rollouts: Rollouts, rewards_N: np.ndarray, rows: np.ndarray) -> Shaped:
        """Nothing: it is cross-entropy."""
        return Shaped(metrics={"reward_best": float(rewards_N[rows].mean())})


SHAPINGS: dict[str, type[Shaping]] = {
    "ppo": PPOShaping,
    "grpo": GRPOShaping,
    "rloo": RLOOShaping,
    "online_dpo": PairShaping,
    "best_of_n": BestShaping,
}
"""The shaping of each objective that learns from the policy's own answers."""


def _spread(value_N: np.ndarray, rows: list[np.ndarray]) -> list[np.ndarray]:
    return [np.full(len(row), value, dtype=np.float64) for value, row in zip(value_N, rows, strict=True)]
