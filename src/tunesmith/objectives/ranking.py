"""Learning from an order of K answers: Plackett-Luce over the whole order, or Bradley-Terry over all its pairs.

Both take scores of n items of K answers, best first, [n, K]; with K = 2 both are the loss of a pair. An item counts once, whatever its K.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..data.batching import Batch
from ..models.policy import TokenOutputs
from ..recipe.objective import RankingObjective
from ._base import Term
from ._pairs import best_cross_entropy, best_weight, entropy_metric, first_rows, items_by_size, log_ratios, preference_metrics, row_sums


def plackett_luce(scores_NK: Tensor) -> Tensor:
    """-sum_k log(exp(s_k) / sum_{j >= k} exp(s_j)), [n]: Rafailov et al. 2023, arXiv:2305.18290, appendix A.3, eq. 18 to 20."""
    places = scores_NK.shape[1]
    terms = [torch.logsumexp(scores_NK[:, k:], dim=1) - scores_NK[:, k] for k in range(places - 1)]
    return torch.stack(terms).sum(dim=0) if terms else scores_NK.new_zeros(len(scores_NK))


def all_pairs(scores_NK: Tensor, margin_N: Tensor | float = 0.0) -> Tensor:
    """-mean over pairs i before j of log sigmoid(s_i - s_j - margin), [n]: Ouyang et al. 2022, arXiv:2203.02155, eq. 1."""
    better, worse = pair_places(scores_NK.shape[1])
    margin_N1 = torch.as_tensor(margin_N, dtype=scores_NK.dtype, device=scores_NK.device).reshape(-1, 1)
    losses_NP = -logsigmoid(scores_NK[:, better] - scores_NK[:, worse] - margin_N1)
    return losses_NP.sum(dim=1) / max(len(better), 1)


def pair_places(places: int) -> tuple[np.ndarray, np.ndarray]:
    """The places (better, worse) of all pairs of an order, [K (K - 1) / 2] int64 each."""
    return np.triu_indices(places, k=1)


def pair_accuracy(scores_B: Tensor, batch: Batch) -> float:
    """Sum over items of the share of an item's pairs whose better answer has the higher score."""
    total = 0.0
    for rows in items_by_size(batch):
        better, worse = pair_places(rows.shape[1])
        total += float((scores_B[rows[:, better]] > scores_B[rows[:, worse]]).double().sum()) / max(len(better), 1)
    return total


ORDER_LOSSES: dict[str, Callable[[Tensor], Tensor]] = {"plackett_luce": plackett_luce, "all_pairs": all_pairs}


class Ranking:
    """DPO on rankings: scores are beta times log-ratios to the reference. Reads reference_B, unless there is no reference."""

    needs = frozenset({"logprobs", "entropy"})

    def __init__(self, settings: RankingObjective):
        self.loss, self.beta, self.sft_coef = ORDER_LOSSES[settings.loss], settings.beta, settings.sft_coef
        self.reference = settings.reference != "none"

    def divisors(self, batch: Batch) -> Mapping[str, float]:
        """The number of items; the best answers' weights."""
        divisors = {"preference": float(len(batch.items))}
        return divisors | ({"cross_entropy": float(best_weight(batch).sum(dtype="float64"))} if self.sft_coef else {})

    def terms(self, outputs: TokenOutputs, batch: Batch) -> Mapping[str, Term]:
        """The sum over items, and that of the best answers' cross-entropy."""
        scores_B = self._scores(outputs.logprobs, batch)
        terms = {"preference": Term(torch.stack([self.loss(scores_B[rows]).sum() for rows in items_by_size(batch)]).sum())}
        return terms | ({"cross_entropy": best_cross_entropy(outputs.logprobs, batch, self.sft_coef)} if self.sft_coef else {})

    def metrics(self, outputs: TokenOutputs, batch: Batch) -> Mapping[str, tuple[float, float]]:
        """Implicit rewards and log-probabilities of the best (chosen) and the worst (rejected); accuracy over all pairs."""
        logprobs_S = outputs.logprobs.detach()
        scores_B, first = self._scores(logprobs_S, batch), first_rows(batch)
        last = np.append(first[1:], len(batch.item_B)) - 1
        accuracy = {"rewards/accuracies": (pair_accuracy(scores_B, batch), float(len(first)))}
        return {**preference_metrics(scores_B, row_sums(logprobs_S, batch), first, last), **accuracy, **entropy_metric(outputs)}

    def _scores(self, logprobs_S: Tensor, batch: Batch) -> Tensor:
        return self.beta * log_ratios(logprobs_S, batch, reference=self.reference)
