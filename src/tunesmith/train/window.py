"""One accumulation window: forward and backward over its batches, each term divided once by the window's whole divisor."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models.policy import Policy
from ..objectives import Objective
from .devices import summed

Between = Callable[[], None]
Backward = Callable[[Tensor], None]
LOSS, TERM, METRIC, DIVISOR = "loss", "term ", "metric ", "divisor "  # what the processes tell one another of a window


def nothing() -> None:
    """What is done between batches where nothing is asked for."""


@dataclass(frozen=True)
class WindowResult:
    """What a window gave."""

    loss: float
    terms: dict[str, float]
    """Each term's mean, before its coefficient."""
    metrics: dict[str, float]
    samples: tuple[dict[str, Any], ...] = ()
    """Some answers, where answers were sampled."""


def window_divisors(objective: Objective, batches: Sequence[Any]) -> dict[str, float]:
    """Each term's divisor over the window, the shares of all processes together."""
    totals: dict[str, float] = defaultdict(float)
    for batch in batches:
        for name, value in objective.divisors(batch).items():
            totals[name] += value * batch.counts
    return summed(totals)


def run_window(
    policy: Policy,
    objective: Objective,
    batches: Sequence[Any],
    *,
    backward: Backward | None = Tensor.backward,
    between: Between = nothing,
) -> WindowResult:
    """Runs a window, calling `between` before each batch; a term whose divisor is 0 gives nothing.

    backward: what is done with each batch's loss, so that gradients are added to the parameters' own: those of this process's share, whose
    sum over the processes is the window's. None: no gradients. What is returned is the whole window's.
    """
    divisors = window_divisors(objective, batches)
    found: dict[str, float] = defaultdict(float)
    for batch in batches:
        between()
        with torch.set_grad_enabled(backward is not None):
            outputs = policy(batch.forest, needs=objective.needs)
            parts = []
            for name, (total, coefficient) in objective.terms(outputs, batch).items():
                if divisors[name] == 0:
                    continue
                mean = total / divisors[name] * batch.counts
                found[TERM + name] += float(mean.detach())
                found[LOSS] += coefficient * float(mean.detach())
                parts.append(coefficient * mean)
            if backward is not None and parts:
                backward(torch.stack(parts).sum())
        for name, (total, divisor) in objective.metrics(outputs, batch).items() if batch.counts else ():
            found[METRIC + name] += total
            found[DIVISOR + name] += divisor
    found = summed(found)
    terms = {name.removeprefix(TERM): value for name, value in found.items() if name.startswith(TERM)}
    measured = {name.removeprefix(DIVISOR): value for name, value in found.items() if name.startswith(DIVISOR) and value}
    metrics = {name: found[METRIC + name] / divisor for name, divisor in measured.items()}
    return WindowResult(found.get(LOSS, 0.0), terms, metrics)


def evaluate_loss(policy: Policy, objective: Objective, batches: Iterable[Any], *, between: Between = nothing) -> WindowResult:
    """The loss over held-out batches as one window, without dropout: it does not depend on how the rows are batched.

    between: called before each batch; what it raises ends the evaluation.
    """
    made = []
    for batch in batches:
        between()
        made.append(batch)
    with policy.deterministic():
        return run_window(policy, objective, made, backward=None, between=between)
