"""Full and partial tuning: the model's own parameters train, and the result is a whole model."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from ...recipe import FullMethod
from ..load import LoadedModel


class Full:
    """Every parameter trains."""

    unchanged = True
    mergeable = None

    def resolve(self, model: PreTrainedModel, settings: FullMethod) -> FullMethod:
        """Nothing is derived."""
        return settings

    def attach(self, loaded: LoadedModel, settings: FullMethod, *, seed: int, new_tokens: list[int]) -> nn.Module:
        """All parameters, in the dtype they are held in; the optimiser keeps fp32 masters."""
        loaded.model.requires_grad_(True)
        return loaded.model

    def trainable(self, model: PreTrainedModel, settings: FullMethod) -> int:
        """All of them."""
        return sum(p.numel() for p in model.parameters())
