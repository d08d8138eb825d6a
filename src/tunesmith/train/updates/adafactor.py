"""Adafactor (Shazeer & Stern 2018, arXiv:1804.04235): of a matrix's squared gradients only row and column means are remembered.

As transformers' trainer takes it, the learning rate is the recipe's own (no relative steps, no scaling by the weights' size), so that a
rate that suits AdamW is of the right order here too.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._rule import Moment

DECAY = -0.8  # the second moment's decay at step t is 1 - t ** DECAY (section 7.2)
SMALL = 1e-30  # added to squared gradients
CLIP = 1.0  # an update whose root mean square is above this is scaled down (section 6)


class Adafactor:
    """A few bytes a row and a column."""

    group = None

    def remember(self, shape: torch.Size, device: torch.device) -> dict[str, Tensor]:
        """Means of squared gradients: of a matrix along its last two dimensions, of a vector each number's own."""
        if len(shape) < 2:
            return {"second": torch.zeros(shape, dtype=torch.float32, device=device)}
        row, column = [*shape[:-1], 1], [*shape[:-2], 1, shape[-1]]
        return {"row": torch.zeros(row, dtype=torch.float32, device=device), "column": torch.zeros(column, device=device)}

    def update(self, master: Tensor, gradient: Tensor, memory: dict[str, Tensor], moment: Moment) -> None:
        """One step."""
        share = moment.step**DECAY
        if master.dim() < 2:
            update = memory["second"].lerp_(gradient.square().add_(SMALL), share).rsqrt()
        else:
            row, column = memory["row"], memory["column"]
            squares = gradient.square().add_(SMALL)
            row.lerp_(squares.mean(-1, keepdim=True), share)
            column.lerp_(squares.mean(-2, keepdim=True), share)
            update = torch.mul((row / row.mean(-2, keepdim=True)).rsqrt_(), column.rsqrt(), out=squares)
        update.mul_(gradient)
        size = float(torch.linalg.vector_norm(update)) / math.sqrt(max(1, update.numel()))
        master.mul_(1 - moment.learning_rate * moment.decay).sub_(update, alpha=moment.learning_rate / max(1.0, size / CLIP))
