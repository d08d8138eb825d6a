"""The learning rate of each update, in closed form: it depends on the update's number alone, whatever the accumulation or the processes."""

from __future__ import annotations

import math


def learning_rate(step: int, *, total: int, warmup: int, peak: float, kind: str) -> float:
    """The rate of update `step` (from 0) of `total`: linear warm-up from 0, then cosine or linear to 0, or constant, as in transformers."""
    if step < warmup:
        return peak * step / max(1, warmup)
    if kind == "constant":
        return peak
    progress = (step - warmup) / max(1, total - warmup)
    return peak * (max(0.0, 0.5 * (1 + math.cos(math.pi * progress))) if kind == "cosine" else max(0.0, 1 - progress))
