"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) by torch's fused kernel, in fp32; bf16 weights on a CPU by a loop of ours.

The kernel is called as it is: what `torch.optim.adamw.adamw` does about it takes a tenth of an update where tensors are moved in blocks.
It is no public function; tests/train/test_optimiser.py compares its updates with torch's own optimiser.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...models import kernels
from ...recipe import Stage
from ._rule import Moment


class AdamW:
    """Two moments a weight, 8 bytes."""

    group = 1

    def __init__(self, stage: Stage):
        self.beta1, self.beta2, self.epsilon = stage.adam_beta1, stage.adam_beta2, stage.adam_epsilon

    def remember(self, shape: torch.Size, device: torch.device) -> dict[str, Tensor]:
        """The moments."""
        return {name: torch.zeros(shape, dtype=torch.float32, device=device) for name in ("first", "second")}

    def update(self, master: Tensor, gradient: Tensor, memory: dict[str, Tensor], moment: Moment) -> None:
        """One step."""
        torch._fused_adamw_(
            [master],
            [gradient],
            [memory["first"]],
            [memory["second"]],
            [],
            [torch.full((), moment.step, dtype=torch.float32, device=master.device)],
            lr=moment.learning_rate,
            beta1=self.beta1,
            beta2=self.beta2,
            weight_decay=moment.decay,
            eps=self.epsilon,
            amsgrad=False,
            maximize=False,
        )

    def update_halves(
        self, weight: Tensor, low: Tensor, gradient: Tensor, memory: dict[str, Tensor], factor: float, moment: Moment, *, place: int
    ) -> None:
        """One step of a bf16 weight whose masters' lower halves are `low`, the gradient multiplied by a factor: all in one pass.

        place: of the first number in its tensor, by which it is rounded.
        """
        kernels.adamw(
            weight,
            low,
            gradient,
            memory["first"],
            memory["second"],
            place=place,
            factor=factor,
            rate=moment.learning_rate,
            beta1=self.beta1,
            beta2=self.beta2,
            epsilon=self.epsilon,
            decay=moment.decay,
            correction1=1 - self.beta1**moment.step,
            correction2=math.sqrt(1 - self.beta2**moment.step),
        )
