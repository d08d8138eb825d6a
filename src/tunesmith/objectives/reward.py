"""A reward model from pairs or rankings: the score at each answer's last token, higher for the better one.

Bradley-Terry over all pairs of an item (Ouyang et al. 2022, arXiv:2203.02155, eq. 1), with the margin of Touvron et al. 2023
(arXiv:2307.09288, eq. 2) where the data give one; or Plackett-Luce over the order. Centring (Eisenstein et al. 2023, arXiv:2312.09244)
is a term of its own: the mean over an item's pairs of (s_better + s_worse)^2, since pairs alone leave the scores' level open.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..data.batching import Batch
from ..models.policy import TokenOutputs
from ..recipe.objective import RewardObjective
from ._base import Term
from ._pairs import column, first_rows, items_by_size
from .ranking import all_pairs, pair_accuracy, pair_places, plackett_luce


def centring(scores_NK: Tensor) -> Tensor:
    """The mean over an item's pairs of (s_i + s_j)^2, [n]."""
    better, worse = pair_places(scores_NK.shape[1])
    return (scores_NK[:, better] + scores_NK[:, worse]).square().sum(dim=1) / max(len(better), 1)


class RewardLoss:
    """The mean over items. Reads margin_I where the batch has it (NaN is none) and the loss is over pairs."""

    needs = frozenset({"scores"})

    def __init__(self, settings: RewardObjective):
        self.loss, self.centre = settings.loss, settings.center_rewards_coefficient

    def divisors(self, batch: Batch) -> Mapping[str, float]:
        """The number of items, for each term."""
        items = float(len(batch.items))
        return {"preference": items} | ({"centring": items} if self.centre else {})

    def terms(self, outputs: TokenOutputs, batch: Batch) -> Mapping[str, Term]:
        """The sum over items, and that of the squares that centring holds down."""
        scores_B, groups = outputs.scores.double(), items_by_size(batch)
        margin_I = torch.nan_to_num(column(batch, "margin_I", scores_B)) if "margin_I" in batch.columns else None
        losses, squares = [], []
        for rows in groups:
            margin_N = 0.0 if margin_I is None else margin_I[batch.item_B[rows[:, 0]]]
            losses.append((plackett_luce(scores_B[rows]) if self.loss == "plackett_luce" else all_pairs(scores_B[rows], margin_N)).sum())
            squares.append(centring(scores_B[rows]).sum())
        terms = {"preference": Term(torch.stack(losses).sum())}
        return terms | ({"centring": Term(torch.stack(squares).sum(), self.centre)} if self.centre else {})

    def metrics(self, outputs: TokenOutputs, batch: Batch) -> Mapping[str, tuple[float, float]]:
        """By TRL's names: accuracy over all pairs of an item, margin (best less worst), mean_reward over answers."""
        scores_B, first = outputs.scores.detach().double(), first_rows(batch)
        items = float(len(first))
        best_less_worst = sum(float((scores_B[rows[:, 0]] - scores_B[rows[:, -1]]).sum()) for rows in items_by_size(batch))
        return {
            "accuracy": (pair_accuracy(scores_B, batch), items),
            "margin": (best_less_worst, items),
            "mean_reward": (float(scores_B.sum()), float(len(scores_B))),
        }
