"""Rows of a batch as objectives of preference see them: sums over a row's tokens, the rows of an item, and what pairs are logged by.

Takes a `Batch` (forest, item_B, columns) and values per supervised token [S]; gives values per row [B] or per item [I], in float64, since
log-probabilities of long answers are large numbers whose small differences are what is learned from.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ..data.batching import Batch
from ..models.policy import TokenOutputs
from ._base import Term


def column(batch: Batch, name: str, like: Tensor) -> Tensor:
    """A column of the batch on the device and in the dtype of `like`. KeyError: the batch has none of that name."""
    return torch.as_tensor(batch.columns[name]).to(device=like.device, dtype=like.dtype)


def row_sums(value_S: Tensor, batch: Batch) -> Tensor:
    """Each row's sum over its supervised tokens, [B] float64."""
    row_S = torch.from_numpy(batch.forest.row_S).to(value_S.device)
    zero_B = torch.zeros(len(batch.forest.lengths_B), dtype=torch.float64, device=value_S.device)
    return zero_B.index_add(0, row_S, value_S.double())


def row_counts(batch: Batch, device: torch.device) -> Tensor:
    """Each row's number of supervised tokens, [B] float64, at least 1."""
    counts_B = np.bincount(batch.forest.row_S, minlength=len(batch.forest.lengths_B)).clip(min=1)
    return torch.from_numpy(counts_B).to(device=device, dtype=torch.float64)


def log_ratios(logprobs_S: Tensor, batch: Batch, *, reference: bool, mean: bool = False) -> Tensor:
    """log p(answer) - log p_reference(answer) of each row, [B] float64, in nats; the bare log-probability without a reference.

    mean: over the answer's tokens in place of their sum. Reads reference_B where there is a reference.
    """
    sums_B = row_sums(logprobs_S, batch)
    if reference:
        sums_B = sums_B - column(batch, "reference_B", sums_B)
    return sums_B / row_counts(batch, sums_B.device) if mean else sums_B


def first_rows(batch: Batch) -> np.ndarray:
    """The first row of each item, which is the chosen or the best answer, [I] int64."""
    return np.flatnonzero(np.diff(batch.item_B, prepend=-1))


def items_by_size(batch: Batch) -> list[np.ndarray]:
    """The rows of all items that have K rows, [n, K] int64, for each K that there is; best first, as in the batch."""
    first_I = first_rows(batch)
    size_I = np.diff(first_I, append=len(batch.item_B))
    return [first_I[size_I == k][:, None] + np.arange(k) for k in np.unique(size_I)]


def pair_rows(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """The rows of the chosen and of the rejected answers, [I] int64 each. ValueError: an item is not a pair."""
    groups = items_by_size(batch)
    if any(rows.shape[1] != 2 for rows in groups):
        raise ValueError("an item of the batch is not a pair of rows")
    rows_I2 = np.concatenate(groups) if groups else np.zeros((0, 2), dtype=np.int64)
    return rows_I2[:, 0], rows_I2[:, 1]


def best_weight(batch: Batch) -> np.ndarray:
    """Loss weights of the supervised tokens of each item's first row, 0 elsewhere, [S] float32."""
    is_first_B = np.zeros(len(batch.item_B), dtype=bool)
    is_first_B[first_rows(batch)] = True
    return np.where(is_first_B[batch.forest.row_S], batch.forest.weight_S, np.float32(0))


def best_cross_entropy(logprobs_S: Tensor, batch: Batch, coefficient: float) -> Term:
    """Weighted cross-entropy of each item's first row, a sum in nats; its divisor is the sum of `best_weight`."""
    weight_S = torch.from_numpy(best_weight(batch)).to(logprobs_S.device)
    return Term(-(weight_S.double() * logprobs_S.double()).sum(), coefficient)


def entropy_metric(outputs: TokenOutputs) -> Mapping[str, tuple[float, float]]:
    """The mean entropy on the answers' tokens, in nats: how sure the policy has become."""
    return {"entropy": (float(outputs.entropy.sum()), float(len(outputs.entropy)))}


def preference_metrics(rewards_B: Tensor, sums_B: Tensor, better: np.ndarray, worse: np.ndarray) -> Mapping[str, tuple[float, float]]:
    """Means over items of implicit rewards and answers' log-probabilities, by TRL's names.

    rewards_B: each row's implicit reward. sums_B: its log-probability. better, worse: rows that are compared, [I].
    """
    rewards_B, sums_B, count = rewards_B.detach(), sums_B.detach(), float(len(better))
    margin_I = rewards_B[better] - rewards_B[worse]
    sums = {
        "rewards/chosen": rewards_B[better],
        "rewards/rejected": rewards_B[worse],
        "rewards/margins": margin_I,
        "rewards/accuracies": (margin_I > 0).double(),
        "logps/chosen": sums_B[better],
        "logps/rejected": sums_B[worse],
    }
    return {name: (float(values_I.sum()), count) for name, values_I in sums.items()}
