"""Policy optimisation without a value function: GRPO, whose advantages are relative to a group of answers, and RLOO.

GRPO, with q = p / p_old of a token (Shao et al. 2024, arXiv:2402.03300, eq. 3) and N answers:

    loss = sum over tokens of w * (correction * -min(q A, clip(q, 1 - epsilon, 1 + epsilon_high) A) + kl_coef * KL penalty) / divisor
    loss_type   w                  divisor
    grpo        1 / its length     N                    each answer alike, so long answers' tokens count less
    dr_grpo     1                  N * max_new_tokens   a constant (Liu et al. 2025, arXiv:2503.20783)
    dapo        1                  number of tokens     all tokens alike (Yu et al. 2025, arXiv:2503.14476, eq. 8)

RLOO, with q of the whole answer (Ahmadian et al. 2024, arXiv:2402.14740): the mean over answers of -min(q A, clip(q) A); its KL is in the
rewards. Advantages of both are computed beforehand, by `group_advantages` and `leave_one_out`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ..data.batching import Batch
from ..models.policy import TokenOutputs
from ..recipe.objective import GRPOObjective, RLOOObjective
from ._base import Term
from ._pairs import column, row_counts, row_sums
from ._rollout import clip_metrics, clipped_surrogate, kl_penalty, rollout_metrics


class GRPO:
    """Reads old_S, advantage_S, correction_S; reference_S where there is a KL coefficient; max_new_tokens with dr_grpo."""

    needs = frozenset({"logprobs", "entropy"})

    def __init__(self, settings: GRPOObjective):
        self.loss_type, self.kl_coef, self.low = settings.loss_type, settings.kl_coef, settings.epsilon
        self.high = settings.epsilon if settings.epsilon_high is None else settings.epsilon_high

    def divisors(self, batch: Batch) -> Mapping[str, float]:
        """Answers, answers times the longest allowed, or tokens: for both terms."""
        divisor = float(len(batch.forest.target_S) if self.loss_type == "dapo" else len(batch.forest.lengths_B))
        if self.loss_type == "dr_grpo":
            divisor *= float(np.asarray(batch.columns["max_new_tokens"]).reshape(()))
        return {"policy": divisor} | ({"kl": divisor} if self.kl_coef else {})

    def terms(self, outputs: TokenOutputs, batch: Batch) -> Mapping[str, Term]:
        """The weighted sums over tokens of the surrogate and of the KL penalty, which has its gradient."""
        logprobs_S, weight_S = outputs.logprobs, self._weight(outputs.logprobs, batch)
        old_S, advantage_S, correction_S = (column(batch, name, logprobs_S) for name in ("old_S", "advantage_S", "correction_S"))
        surrogate_S = clipped_surrogate(logprobs_S - old_S, advantage_S, low=self.low, high=self.high)
        terms = {"policy": Term((weight_S * correction_S * surrogate_S).sum())}
        if self.kl_coef:
            penalty_S = kl_penalty(logprobs_S, old_S, column(batch, "reference_S", logprobs_S))
            terms["kl"] = Term((weight_S * penalty_S).sum(), self.kl_coef)
        return terms

    def metrics(self, outputs: TokenOutputs, batch: Batch) -> Mapping[str, tuple[float, float]]:
        """Those of rollouts and of clipping, per token."""
        logprobs_S = outputs.logprobs.detach()
        log_ratio_S = logprobs_S - column(batch, "old_S", logprobs_S)
        clipping = clip_metrics(log_ratio_S, column(batch, "advantage_S", logprobs_S), low=self.low, high=self.high)
        return {**rollout_metrics(outputs, batch), **clipping}

    def _weight(self, like: Tensor, batch: Batch) -> Tensor:
        """w of each token, [S]."""
        if self.loss_type != "grpo":
            return torch.ones_like(like)
        row_S = torch.from_numpy(batch.forest.row_S).to(like.device)
        return (1 / row_counts(batch, like.device))[row_S].to(like.dtype)


class RLOO:
    """Reads old_S, advantage_S (the same at each of an answer's tokens), correction_S (whose mean counts), and for the log reference_S."""

    needs = frozenset({"logprobs", "entropy"})

    def __init__(self, settings: RLOOObjective):
        self.epsilon = settings.epsilon

    def divisors(self, batch: Batch) -> Mapping[str, float]:
        """The number of answers."""
        return {"policy": float(len(batch.forest.lengths_B))}

    def terms(self, outputs: TokenOutputs, batch: Batch) -> Mapping[str, Term]:
        """The sum over answers of the surrogate of the whole answer's ratio."""
        log_ratio_B, advantage_B = self._ratio(outputs.logprobs, batch)
        correction_B = self._mean("correction_S", outputs.logprobs, batch)
        surrogate_B = clipped_surrogate(log_ratio_B, advantage_B, low=self.epsilon, high=self.epsilon)
        return {"policy": Term((correction_B * surrogate_B).sum())}

    def metrics(self, outputs: TokenOutputs, batch: Batch) -> Mapping[str, tuple[float, float]]:
        """Those of rollouts, and of clipping over answers."""
        log_ratio_B, advantage_B = self._ratio(outputs.logprobs.detach(), batch)
        return {**rollout_metrics(outputs, batch), **clip_metrics(log_ratio_B, advantage_B, low=self.epsilon, high=self.epsilon)}

    def _ratio(self, logprobs_S: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """log p - log p_old of each answer and its advantage, [B] float64."""
        return row_sums(logprobs_S - column(batch, "old_S", logprobs_S), batch), self._mean("advantage_S", logprobs_S, batch)

    def _mean(self, name: str, like: Tensor, batch: Batch) -> Tensor:
        """A column's mean over each answer's tokens, [B] float64."""
        return row_sums(column(batch, name, like), batch) / row_counts(batch, like.device)
