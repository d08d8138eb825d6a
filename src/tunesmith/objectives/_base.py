"""The contract between the loop and an objective.

An objective gives, for each of its terms, a *sum* over the batch and a coefficient; and, before the backward pass, each term's divisor for
that batch. The loop adds the divisors over the accumulation window and divides once:

    loss = sum over terms of coefficient * (sum over the window's batches) / (sum of the window's divisors)

so that neither the micro-batch nor the accumulation changes the loss. Rows, pairs, groups and rollouts are the batch's matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from ..models.policy import TokenOutputs


class Term(NamedTuple):
    """One term of a loss: an undivided sum, and what it is multiplied by after the division."""

    sum: Tensor
    coefficient: float = 1.0


class Objective(Protocol):
    """Pure functions over a batch, which holds at least `.forest`."""

    needs: frozenset[str]
    """What the policy must give: logprobs, entropy, values, scores."""

    def divisors(self, batch: Any) -> Mapping[str, float]:
        """Each term's divisor for one batch, from the batch alone."""

    def terms(self, outputs: TokenOutputs, batch: Any) -> Mapping[str, Term]:
        """Each term's sum over one batch, differentiable."""

    def metrics(self, outputs: TokenOutputs, batch: Any) -> Mapping[str, tuple[float, float]]:
        """What is logged besides: name to (sum, divisor), added over the window like the terms."""
