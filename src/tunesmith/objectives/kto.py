"""KTO: single answers with a label, weighed as prospect theory has it (Ethayarajh et al. 2024, arXiv:2402.01306).

With r = log p(answer) - log p_reference(answer), and z0 an estimate of the KL from the policy to the reference over the window's prompts,

    loss of a good answer = desirable_weight   * (1 - sigmoid(beta (r - z0)))
    loss of a bad answer  = undesirable_weight * (1 - sigmoid(beta (z0 - r)))            (eq. 8)

z0 is a mean that is cut at 0, which does not add up over batches: it is computed before the window and comes as the column kto_z0.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ..data.batching import Batch
from ..models.policy import TokenOutputs
from ..recipe.objective import KTOObjective
from ._base import Term
from ._pairs import column, entropy_metric, log_ratios, row_sums


def kto_z0(policy_B: np.ndarray, reference_B: np.ndarray) -> float:
    """max(0, mean(log p - log p_reference)) in nats, over rows of one example's prompt with another's answer (section 4.1).

    policy_B, reference_B: sums of log-probabilities over each row's answer, of at least one row.
    """
    return max(0.0, float(np.mean(np.asarray(policy_B, dtype=np.float64) - np.asarray(reference_B, dtype=np.float64))))


def kto_losses(log_ratio_B: Tensor, good_B: Tensor, z0: Tensor | float, *, beta: float) -> Tensor:
    """1 - sigmoid(beta (r - z0)) where good, 1 - sigmoid(beta (z0 - r)) where not, [B]; good_B is bool."""
    return torch.sigmoid(torch.where(good_B, -1.0, 1.0) * beta * (log_ratio_B - z0))


class KTO:
    """The mean over answers of their weighted losses. Reads reference_B, label_I and kto_z0."""

    needs = frozenset({"logprobs", "entropy"})

    def __init__(self, settings: KTOObjective):
        self.beta, self.good_weight, self.bad_weight = settings.beta, settings.desirable_weight, settings.undesirable_weight

    def divisors(self, batch: Batch) -> Mapping[str, float]:
        """The number of answers."""
        return {"preference": float(len(batch.items))}

    def terms(self, outputs: TokenOutputs, batch: Batch) -> Mapping[str, Term]:
        """The sum over answers."""
        log_ratio_B = log_ratios(outputs.logprobs, batch, reference=True)
        good_B = torch.from_numpy(_good(batch)).to(log_ratio_B.device)
        losses_B = kto_losses(log_ratio_B, good_B, column(batch, "kto_z0", log_ratio_B).reshape(()), beta=self.beta)
        return {"preference": Term((torch.where(good_B, self.good_weight, self.bad_weight) * losses_B).sum())}

    def metrics(self, outputs: TokenOutputs, batch: Batch) -> Mapping[str, tuple[float, float]]:
        """Implicit rewards and log-probabilities, of the good as chosen and of the bad as rejected; kl, which is z0."""
        logprobs_S = outputs.logprobs.detach()
        rewards_B, sums_B = self.beta * log_ratios(logprobs_S, batch, reference=True), row_sums(logprobs_S, batch)
        good, count = _good(batch), float(len(batch.items))
        metrics = {"kl": (float(np.asarray(batch.columns["kto_z0"]).reshape(())) * count, count), **entropy_metric(outputs)}
        for name, rows in (("chosen", np.flatnonzero(good)), ("rejected", np.flatnonzero(~good))):
            metrics[f"rewards/{name}"] = (float(rewards_B[rows].sum()), float(len(rows)))
            metrics[f"logps/{name}"] = (float(sums_B[rows].sum()), float(len(rows)))
        return metrics


def _good(batch: Batch) -> np.ndarray:
    """Whether each row's answer is labelled good, [B] bool."""
    return np.asarray(batch.columns["label_I"], dtype=bool)[batch.item_B]
