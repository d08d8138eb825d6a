"""What a stage optimises: pure functions from a policy's outputs and a batch to sums with their divisors."""

from ._base import Objective, Term
from .sft import SFT

OBJECTIVES: dict[str, type[Objective]] = {"sft": SFT}

__all__ = ["OBJECTIVES", "Objective", "SFT", "Term"]
