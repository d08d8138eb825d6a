"""Update rules by the names that a recipe gives them: which rule moves which tensor."""

from __future__ import annotations

import importlib.util

import torch

from ...errors import RecipeError
from ...recipe import Stage
from ._rule import Moment, Rule
from .adafactor import Adafactor
from .adamw import AdamW
from .adamw_8bit import MOMENTS_BLOCK, SMALLEST, AdamW8bit
from .muon import Muon

__all__ = ["MOMENTS_BLOCK", "Choice", "Moment", "Rule", "require_optimiser"]

PAGED = "paged_adamw_8bit"


class Choice:
    """A stage's `optim`: the rule of each tensor."""

    def __init__(self, stage: Stage):
        self.optim = stage.optim
        self.adamw = AdamW(stage)
        self.main: Rule = self.adamw
        if stage.optim == "adafactor":
            self.main = Adafactor()
        elif stage.optim == "muon":
            self.main = Muon()
        elif stage.optim in ("adamw_8bit", PAGED):
            self.main = AdamW8bit(stage, paged=stage.optim == PAGED)

    def rule(self, shape: torch.Size, *, table: bool) -> Rule:
        """The rule of a tensor of this shape. table: whether it is no map between hidden states: an embedding, a head, IA3's scales."""
        if self.optim == "muon" and (table or len(shape) < 2):
            return self.adamw
        if self.optim in ("adamw_8bit", PAGED) and shape.numel() < SMALLEST:
            return self.adamw
        return self.main


def require_optimiser(stage: Stage) -> None:
    """Raises RecipeError where a stage's `optim` cannot work on this machine."""
    where = f"stages.{stage.name}.optim"
    if stage.optim in ("adamw_8bit", PAGED) and importlib.util.find_spec("bitsandbytes") is None:
        raise RecipeError(f"{stage.optim} needs bitsandbytes, which is not installed", where=where, mend="pip install bitsandbytes")
    if stage.optim == PAGED and not torch.cuda.is_available():
        raise RecipeError(f"{PAGED} needs a CUDA device, and this machine has none", where=where, mend="adamw_8bit, which works without")
