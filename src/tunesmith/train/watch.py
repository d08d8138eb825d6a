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


def watch_answers(answers: Sequence[Answered], group: int) -> dict[str, float]:
    """Mean length in tokens, the share that ended by themselves, and that of repeated 3-grams of tokens; and how much prompts matter.

    distinct: of the first answers to each prompt, the share that differ from one another; a collapsed policy says one thing to all. group:
    answers to a prompt, which stand together.
    """
    made = [answer.generation for answer in answers]
    firsts = made[::group]
    return {
        "length": float(np.mean([len(one.token_ids) for one in made])),
        "finished": float(np.mean([one.finish_reason == "stop" for one in made])),
        "distinct": len({one.text for one in firsts}) / len(firsts),
        "repetition": float(np.mean([repetition(one.token_ids) for one in made])),
    }


def repetition(tokens: Sequence[int]) -> float:
    """The share of an answer's 3-grams that occurred in it before, 0 to 1.

    >>> repetition([1, 2, 3, 4]), repetition([1, 1, 1, 1, 1])
    (0.0, 0.6666666666666667)
    """
    grams = [tuple(tokens[i : i + NGRAM]) for i in range(len(tokens) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


class Baseline:
    """What later iterations are compared with: the first one's mean length and share of distinct answers."""

    NAMES = ("length", "distinct")

    def __init__(self) -> None:
        self.first: dict[str, float] = {}

    def see(self, metrics: Mapping[str, float]) -> None:
        """Remembers the first iteration."""
        self.first = self.first or {name: metrics[name] for name in self.NAMES}

    def ratio(self, name: str, metrics: Mapping[str, float]) -> float:
        """A metric over what it was first; 1 where that was 0 or nothing."""
        return metrics[name] / self.first[name] if self.first.get(name) else 1.0

    def state(self) -> dict[str, torch.Tensor]:
        """For a checkpoint."""
        return {f"baseline.{name}": torch.tensor(value, dtype=torch.float64) for name, value in self.first.items()}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """From a checkpoint."""
        self.first = {name: float(state[f"baseline.{name}"]) for name in self.NAMES if f"baseline.{name}" in state}


def broken_rule(watch: WatchSection, metrics: Mapping[str, float], baseline: Baseline) -> dict[str, Any] | None:
    """The first stop rule that an iteration breaks, as {"rule", "value", "limit"}; None where all hold or are switched off."""
    upper = {
        "max_kl": (metrics.get("kl", 0.0), watch.max_kl),
        "max_length_ratio": (baseline.ratio("length", metrics), watch.max_length_ratio),
    }
    lower = {
        "min_distinct_ratio": (baseline.ratio("distinct", metrics), watch.min_distinct_ratio),
        "min_entropy": (metrics["entropy"], watch.min_entropy),
    }
    for rule, (value, limit) in {**upper, **lower}.items():
        if limit is not None and (value > limit if rule in upper else value < limit):
            return {"rule": rule, "value": value, "limit": limit}
    return None
