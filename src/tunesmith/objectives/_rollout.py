"""What the objectives on sampled answers share: the clipped surrogate, estimates of the KL, and what is logged.

Per token [S], in nats. `old` is the policy that the answers were sampled from, `reference` the one that the policy is held to.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..data.batching import Batch
from ..models.policy import TokenOutputs
from ._pairs import column


def clipped_surrogate(log_ratio: Tensor, advantage: Tensor, *, low: float, high: float) -> Tensor:
    """-min(q A, clip(q, 1 - low, 1 + high) A) with q = exp(log_ratio), in any shape: Schulman et al. 2017, arXiv:1707.06347, eq. 7."""
    ratio = torch.exp(log_ratio)
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def kl_k1(logprobs: Tensor, reference: Tensor) -> Tensor:
    """log p - log p_reference of sampled tokens: its mean is the KL, a single one may be negative (Schulman 2020)."""
    return logprobs - reference


def kl_k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """exp(d) - 1 - d with d = log p_reference - log p of sampled tokens: its mean is the KL, and none is negative (Schulman 2020)."""
    difference = reference - logprobs
    return torch.expm1(difference) - difference


def kl_penalty(logprobs_S: Tensor, old_S: Tensor, reference_S: Tensor) -> Tensor:
    """q k3 with q = p / p_old, whose gradient, too, is that of the KL in the mean over tokens sampled from `old`, [S].

    k3 alone (Shao et al. 2024, arXiv:2402.03300, eq. 4) has the KL's value and another's gradient, that of KL(reference || policy), since
    it leaves out that the tokens' own probabilities change; q puts it back (DeepSeek-V3.2, arXiv:2512.02556, section 3.1).
    """
    return torch.exp(logprobs_S - old_S) * kl_k3(logprobs_S, reference_S)


def rollout_metrics(outputs: TokenOutputs, batch: Batch) -> Mapping[str, tuple[float, float]]:
    """What every objective on per-token log-probabilities logs.

    entropy: nats a token. kl, kl_k3: from the policy that sampled to the reference, nats a sequence, where the batch has reference_S.
    policy_kl: from the policy that sampled to the one now, nats a sequence.
    """
    logprobs_S = outputs.logprobs.detach()
    old_S, rows = column(batch, "old_S", logprobs_S), float(len(batch.forest.lengths_B))
    metrics = {
        "entropy": (float(outputs.entropy.sum()), float(len(outputs.entropy))),
        "policy_kl": (float(kl_k3(old_S, logprobs_S).double().sum()), rows),
    }
    if "reference_S" in batch.columns:
        reference_S = column(batch, "reference_S", logprobs_S)
        metrics["kl"] = (float(kl_k1(old_S, reference_S).double().sum()), rows)
        metrics["kl_k3"] = (float(kl_k3(old_S, reference_S).double().sum()), rows)
    return metrics


def clip_metrics(log_ratio: Tensor, advantage: Tensor, *, low: float, high: float) -> Mapping[str, tuple[float, float]]:
    """Mean ratio, and the shares of ratios where clipping takes the gradient away, below, above and in all, by TRL's names."""
    ratio, count = torch.exp(log_ratio.detach()), float(log_ratio.numel())
    below = float(((ratio < 1 - low) & (advantage < 0)).sum())
    above = float(((ratio > 1 + high) & (advantage > 0)).sum())
    return {
        "ratio": (float(ratio.double().sum()), count),
        "clip_ratio/low_mean": (below, count),
        "clip_ratio/high_mean": (above, count),
        "clip_ratio/region_mean": (below + above, count),
    }
