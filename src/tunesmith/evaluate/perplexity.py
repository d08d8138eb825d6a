"""Perplexity of references given their prompts, kept per item so that it can be compared in pairs.

Takes a Generator's log-probabilities; gives the sum of nats and the number of tokens of each item. exp(sum of nats / tokens) over all
items weighs every token once, whatever the batches were.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import NonFinite, TunesmithError
from ..generate.protocol import Generator
from ..score import Perplexity


@dataclass(frozen=True)
class ReferenceNats:
    """For each item the negative log-probability of its reference in nats, and the reference's tokens."""

    nats: tuple[float, ...]
    tokens: tuple[int, ...]

    @property
    def statistic(self) -> Perplexity:
        """Perplexity as a statistic over items."""
        return Perplexity(self.nats, self.tokens)


def reference_nats(generator: Generator, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> ReferenceNats:
    """Sums the nats of each answer given its prompt, in float64.

    prompts, answers: N rows of token ids; an answer has at least one token (ValueError otherwise). Raises NonFinite, naming the item,
    where a log-probability is NaN or infinite, and TunesmithError where the generator returns another number of rows or tokens.
    """
    if any(len(answer) == 0 for answer in answers):
        raise ValueError("an empty answer has no perplexity")
    rows = generator.logprobs(prompts, answers) if prompts else []
    if [len(row) for row in rows] != [len(answer) for answer in answers]:
        raise TunesmithError("the generator did not score every token of every answer", mend="report this: the generator is at fault")
    for position, row in enumerate(rows):
        if not np.isfinite(row).all():
            raise NonFinite("a log-probability is not finite", where=f"item {position}", mend="the weights are damaged: train again")
    return ReferenceNats(tuple(float(-np.asarray(row, np.float64).sum()) for row in rows), tuple(len(row) for row in rows))
