"""Supervised fine-tuning: weighted cross-entropy on the answers' tokens (maximum likelihood; Wei et al. 2021, arXiv:2109.01652).

loss = - sum_S w_S log p(token_S | before) / sum_S w_S
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..data.batching import Batch
from ..models.policy import TokenOutputs
from ._base import Term


class SFT:
    """Cross-entropy of each supervised token, weighted, over the sum of weights."""

    needs = frozenset({"logprobs"})

    def divisors(self, batch: Batch) -> Mapping[str, float]:
        """The sum of the batch's loss weights."""
        return {"cross_entropy": float(batch.forest.weight_S.sum(dtype="float64"))}

    def terms(self, outputs: TokenOutputs, batch: Batch) -> Mapping[str, Term]:
        """The weighted sum of negative log-probabilities, in nats."""
        weight_S = torch.from_numpy(batch.forest.weight_S).to(outputs.logprobs.device)
        return {"cross_entropy": Term(-(weight_S * outputs.logprobs).sum())}

    def metrics(self, outputs: TokenOutputs, batch: Batch) -> Mapping[str, tuple[float, float]]:
        """Nothing besides the loss."""
        return {}
