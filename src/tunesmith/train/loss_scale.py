"""Loss scaling for a model that is computed in fp16 (Micikevicius et al. 2018, arXiv:1710.03740): small gradients would be rounded to 0.

The loss is multiplied before the backward pass and gradients are divided before anything is done with them. Where they overflow no update
is made: the scale is halved and the same window is computed again, so that no row is passed over. After GROWTH updates in a row without an
overflow the scale is doubled. Scales are powers of two, so scaling itself rounds nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import NonFinite

START, LEAST, MOST = 2.0**16, 1.0, 2.0**24
GROWTH = 2000  # updates


class LossScale:
    """The scale of one stage, and how long it has held."""

    def __init__(self) -> None:
        self._value, self._held = torch.tensor(START), torch.zeros(())

    @property
    def value(self) -> float:
        """What the loss is multiplied by now."""
        return float(self._value)

    def overflowed(self, where: str) -> None:
        """Halves the scale. Raises NonFinite where that leads nowhere: gradients overflow though the loss is not scaled up."""
        if self.value <= LEAST:
            raise NonFinite(
                f"gradients overflow in fp16 at the smallest loss scale ({LEAST:g}); no update was made from them",
                where=where,
                mend="model.dtype: bfloat16 or float32, or a lower learning_rate",
            )
        self._value /= 2
        self._held.zero_()

    def held(self) -> None:
        """Counts an update without an overflow."""
        self._held += 1
        if int(self._held) == GROWTH:
            self._value.mul_(2).clamp_(max=MOST)
            self._held.zero_()

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """What a checkpoint must hold."""
        yield "loss_scale.value", self._value
        yield "loss_scale.held", self._held
