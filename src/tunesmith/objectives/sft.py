"""Supervised fine-tuning: weighted cross-entropy on the answers' tokens (maximum likelihood; Wei et al. 2021, arXiv:2109.01652).

loss = - sum_S w_S log p(token_S | before) / sum_S w_S

Best-of-n tuning is the same on the best of n sampled answers, which its batches hold.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..data.batching import Batch
from ..models.policy import TokenOutputs
from ..recipe.objective import BestOfNObjective, SFTObjective
from ._base import Term


class SFT:
    """Cross-entropy of each supervised token, weighted, over the sum of weights.

    What its settings say of the tokens that carry weight, the batch holds already.
    """

    needs = frozenset({"logprobs"})

    def __init__(self, settings: SFTObjective | BestOfNObjective | None = None):
        self.settings = settings or SFTObjective()

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


class BestOfN(SFT):
    """Cross-entropy on the best of n sampled answers (Touvron et al. 2023, arXiv:2307.09288, section 3.2.3)."""
