"""What a stage optimises. One settings class each; a new objective adds its class to the union."""

from __future__ import annotations

from typing import Literal

from ._base import Section


class SFTObjective(Section):
    """Supervised fine-tuning: cross-entropy on the answers' tokens."""

    type: Literal["sft"] = "sft"
    """The objective's name."""
    train_on: Literal["all", "last"] = "all"
    """Which assistant turns carry loss: all of a conversation's, or the last; a message's own `weight` wins."""


Objective = SFTObjective
