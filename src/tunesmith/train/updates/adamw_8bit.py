"""AdamW with moments in 8 bits, in blocks of 256 numbers with a scale each (Dettmers et al. 2022, arXiv:2110.02861), by bitsandbytes.

Paged: the moments lie in memory that the GPU's driver moves to the host when the GPU has no room; on CUDA only, NOT MEASURED.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...recipe import Stage
from ._rule import Moment

MOMENTS_BLOCK = 256  # numbers that share a scale: what the kernel takes
SMALLEST = 4096  # numbers; a smaller tensor's moments are kept in fp32, as bitsandbytes does
PAGED_FROM = 100_000  # numbers; smaller moments are not worth a page


class AdamW8bit:
    """Two moments a weight, 2 bytes and a little."""

    def __init__(self, stage: Stage, *, paged: bool = False):
        from bitsandbytes import functional

        self.functional, self.paged = functional, paged
        self.group = None if paged else MOMENTS_BLOCK  # a part of a paged tensor is no paged tensor to the kernel
        self.beta1, self.beta2, self.epsilon = stage.adam_beta1, stage.adam_beta2, stage.adam_epsilon
        self.levels = [functional.create_dynamic_map(signed=signed) for signed in (True, False)]

    def remember(self, shape: torch.Size, device: torch.device) -> dict[str, Tensor]:
        """The moments' numbers in 8 bits, and a scale for each block."""
        blocks = math.ceil(shape.numel() / MOMENTS_BLOCK)
        scales = {f"{name}_scale": torch.zeros(blocks, dtype=torch.float32, device=device) for name in ("first", "second")}
        return {name: self._numbers(shape, device) for name in ("first", "second")} | scales

    def _numbers(self, shape: torch.Size, device: torch.device) -> Tensor:
        if not self.paged or shape.numel() < PAGED_FROM:
            return torch.zeros(shape, dtype=torch.uint8, device=device)
        held = self.functional.get_paged(*shape, dtype=torch.uint8, device=device)
        self.functional.fill(held, 0)
        return held

    def update(self, master: Tensor, gradient: Tensor, memory: dict[str, Tensor], moment: Moment) -> None:
        """One step."""
        self.levels = [levels.to(master.device) for levels in self.levels]
        self.functional.optimizer_update_8bit_blockwise(
            "adam",
            gradient,
            master,
            memory["first"],
            memory["second"],
            self.beta1,
            self.beta2,
            0.0,
            0.0,
            self.epsilon,
            moment.step,
            moment.learning_rate,
            self.levels[0],
            self.levels[1],
            memory["first_scale"],
            memory["second_scale"],
            weight_decay=moment.decay,
        )
