"""What is watched while a policy learns from its own answers, and the rules by which such a stage is stopped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from ..recipe import WatchSection

NGRAM = 3


class Answered(Protocol):
    """An answer, as far as it is watched here."""

    @property
    def generation(self) -> Any:
        """Its tokens, text and finish reason."""


def watch_answers(answers: Sequence[Answered]) -> dict[str, float]:
    """Mean length in tokens, the share that ended by themselves, the share of distinct texts, and that of repeated 3-grams of tokens."""
    made = [answer.generation for answer in answers]
    return {
        "length": float(np.mean([len(one.token_ids) for one in made])),
        "finished": float(np.mean([one.finish_reason == "stop" for one in made])),
        "distinct": len({one.text for one in made}) / len(made),
        "repetition": float(np.mean([repetition(one.token_ids) for one in made])),
    }


def repetition(tokens: Sequence[int]) -> float:
    """The share of an answer's 3-grams that occurred in it before, 0 to 1.

    >>> repetition([1, 2, 3, 4]), repetition([1, 1, 1, 1, 1])
    (0.0, 0.6666666666666666)
    """
    grams = [tuple(tokens[i : i + NGRAM]) for i in range(len(tokens) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


class Baseline:
    """What later iterations are compared with: the first one's mean length."""

    def __init__(self) -> None:
        self.length: float | None = None

    def see(self, metrics: Mapping[str, float]) -> None:
        """Remembers the first iteration."""
        if self.length is None:
            self.length = metrics["length"]

    def state(self) -> dict[str, torch.Tensor]:
        """For a checkpoint."""
        return {} if self.length is None else {"baseline.length": torch.tensor(self.length, dtype=torch.float64)}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """From a checkpoint."""
        self.length = float(state["baseline.length"]) if "baseline.length" in state else None


def broken_rule(watch: WatchSection, metrics: Mapping[str, float], baseline: Baseline) -> dict[str, Any] | None:
    """The first stop rule that an iteration breaks, as {"rule", "value", "limit"}; None where all hold or are switched off."""
    ratio = metrics["length"] / baseline.length if baseline.length else 1.0
    upper = {"max_kl": (metrics["kl"], watch.max_kl), "max_length_ratio": (ratio, watch.max_length_ratio)}
    lower = {"min_distinct": (metrics["distinct"], watch.min_distinct), "min_entropy": (metrics["entropy"], watch.min_entropy)}
    for rule, (value, limit) in {**upper, **lower}.items():
        if limit is not None and (value > limit if rule in upper else value < limit):
            return {"rule": rule, "value": value, "limit": limit}
    return None
