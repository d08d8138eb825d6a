"""Muon (Jordan 2024, kellerjordan.github.io/posts/muon): a matrix moves along its momentum with all singular values made about 1.

Updates are scaled to the size of AdamW's (0.2 times the root of the longer side; Liu et al. 2025, arXiv:2502.16982), so that one learning
rate serves the matrices and the rest, which AdamW moves.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._rule import Moment

MOMENTUM = 0.95  # of gradients, with Nesterov's look ahead
ROUNDS = 5  # of the Newton-Schulz iteration
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of its polynomial a x + b x^3 + c x^5
SMALL = 1e-7  # least norm that is divided by
ADAMW_SIZE = 0.2  # root mean square of AdamW's updates, in learning rates


class Muon:
    """One moment a weight, 4 bytes."""

    group = None

    def remember(self, shape: torch.Size, device: torch.device) -> dict[str, Tensor]:
        """The momentum."""
        return {"momentum": torch.zeros(shape, dtype=torch.float32, device=device)}

    def update(self, master: Tensor, gradient: Tensor, memory: dict[str, Tensor], moment: Moment) -> None:
        """One step; of more than two dimensions, the last two are the matrix."""
        momentum = memory["momentum"].lerp_(gradient, 1 - MOMENTUM)
        direction = orthogonalised(gradient.lerp_(momentum, MOMENTUM))
        size = ADAMW_SIZE * math.sqrt(max(master.shape[-2:]))
        master.mul_(1 - moment.learning_rate * moment.decay).sub_(direction, alpha=moment.learning_rate * size)


def orthogonalised(matrix: Tensor) -> Tensor:
    """[..., m, n] with every singular value brought near 1, computed in bf16: five rounds give 0.5 to 1.5."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.bfloat16()
    x = x.mT if tall else x
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_(min=SMALL)
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
