"""What a method is: how its settings are derived from a model, how it is put on one, and how they are read off a saved adapter."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

from peft import PeftConfig
from torch import nn
from transformers import PreTrainedModel

from ...recipe import Method
from ..load import LoadedModel

Settings = TypeVar("Settings", bound=Method)


class MethodKind(Protocol[Settings]):
    """One method; a line in `METHOD_KINDS` each."""

    unchanged: bool
    """Whether a fresh one leaves the model's output as it was."""
    mergeable: str | None
    """Why the result cannot be merged into its base; None where it can, or is a whole model."""

    def resolve(self, model: PreTrainedModel, settings: Settings) -> Settings:
        """The settings with every derived one written out. Raises RecipeError where a name matches nothing of the model."""

    def attach(self, loaded: LoadedModel, settings: Settings, *, seed: int, new_tokens: list[int]) -> nn.Module:
        """The model with what trains made trainable, adapters in fp32, and everything else frozen.

        settings: resolved. new_tokens: ids whose embeddings train besides.
        """

    def trainable(self, model: PreTrainedModel, settings: Settings) -> int:
        """How many numbers train, of resolved settings, counted without attaching; new tokens and heads apart."""


class AdapterKind(MethodKind[Settings], Protocol[Settings]):
    """A method whose result is an adapter in PEFT's layout."""

    peft_type: str
    """What `adapter_config.json` calls it."""

    def config(self, loaded: LoadedModel, settings: Settings, new_tokens: list[int]) -> PeftConfig:
        """PEFT's config of resolved settings."""

    def settings_of(self, config: dict[str, Any], names: list[str]) -> Settings:
        """The settings of a saved adapter: its `adapter_config.json`, and the names of its tensors."""
