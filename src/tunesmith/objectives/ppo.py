"""Proximal policy optimisation: the clipped surrogate and a clipped value loss, on tokens sampled before the update.

    loss = mean over tokens of correction * (-min(q A, clip(q) A)) + vf_coef * mean over tokens of value loss

(Schulman et al. 2017, arXiv:1707.06347; Ouyang et al. 2022, arXiv:2203.02155.) Advantages and returns are computed over all of an
iteration's answers beforehand, by `gae` and `whiten`; the KL to the reference is in the rewards that they are made from.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..data.batching import Batch
from ..models.policy import TokenOutputs
from ..recipe.objective import PPOObjective
from ._base import Term
from ._pairs import column
from ._rollout import clip_metrics, clipped_surrogate, rollout_metrics


def clipped_value_loss(value_S: Tensor, old_value_S: Tensor, return_S: Tensor, *, clip: float) -> Tensor:
    """max((V - R)^2, (V_old + clip(V - V_old, +-clip) - R)^2) / 2, [S]: Schulman et al. 2017's code; Engstrom et al. 2020."""
    clipped_S = old_value_S + (value_S - old_value_S).clamp(-clip, clip)
    return torch.maximum((value_S - return_S).square(), (clipped_S - return_S).square()) / 2


class PPO:
    """The mean over tokens. Reads old_S, advantage_S, correction_S, return_S, old_value_S, and for the log reference_S."""

    needs = frozenset({"logprobs", "entropy", "values"})

    def __init__(self, settings: PPOObjective):
        self.clip, self.value_clip, self.value_coef = settings.cliprange, settings.cliprange_value, settings.vf_coef

    def divisors(self, batch: Batch) -> Mapping[str, float]:
        """The number of tokens, for each term."""
        tokens = float(len(batch.forest.target_S))
        return {"policy": tokens, "value": tokens}

    def terms(self, outputs: TokenOutputs, batch: Batch) -> Mapping[str, Term]:
        """The sums over tokens of the surrogate and of the value loss."""
        log_ratio_S, advantage_S = self._ratio(outputs.logprobs, batch)
        surrogate_S = clipped_surrogate(log_ratio_S, advantage_S, low=self.clip, high=self.clip)
        old_value_S, return_S = (column(batch, name, outputs.values) for name in ("old_value_S", "return_S"))
        value_S = clipped_value_loss(outputs.values, old_value_S, return_S, clip=self.value_clip)
        return {
            "policy": Term((column(batch, "correction_S", log_ratio_S) * surrogate_S).sum()),
            "value": Term(value_S.sum(), self.value_coef),
        }

    def metrics(self, outputs: TokenOutputs, batch: Batch) -> Mapping[str, tuple[float, float]]:
        """Those of rollouts and of clipping; the share of values beyond their clip, and means of values and returns."""
        log_ratio_S, advantage_S = self._ratio(outputs.logprobs.detach(), batch)
        value_S, count = outputs.values.detach(), float(len(outputs.values))
        beyond = (value_S - column(batch, "old_value_S", value_S)).abs() > self.value_clip
        return {
            **rollout_metrics(outputs, batch),
            **clip_metrics(log_ratio_S, advantage_S, low=self.clip, high=self.clip),
            "value_clip_ratio": (float(beyond.sum()), count),
            "values": (float(value_S.sum()), count),
            "returns": (float(column(batch, "return_S", value_S).sum()), count),
        }

    def _ratio(self, logprobs_S: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        return logprobs_S - column(batch, "old_S", logprobs_S), column(batch, "advantage_S", logprobs_S)
