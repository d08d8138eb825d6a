"""What an update rule is: how one fp32 tensor moves, given its gradient and what the rule remembers of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moment:
    """When an update is made, and how far it may go."""

    step: int
    """Updates made so far, this one included: 1 in the first."""
    learning_rate: float
    decay: float
    """Decoupled weight decay: the share of the weight that is taken off, times the learning rate."""


class Rule(Protocol):
    """One rule; it may be asked about any number of tensors and keeps nothing itself."""

    group: int | None
    """Numbers that move together, with what is remembered of them: a tensor may be cut between groups; where it is 1, tensors may be laid
    end to end. None: a tensor moves whole."""

    def remember(self, shape: torch.Size, device: torch.device) -> dict[str, Tensor]:
        """What is remembered of a tensor of this shape before its first update, by name."""

    def update(self, master: Tensor, gradient: Tensor, memory: dict[str, Tensor], moment: Moment) -> None:
        """Moves the fp32 master in place, and what is remembered; the fp32 gradient may be overwritten."""
