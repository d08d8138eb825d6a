"""Bottleneck adapters after, or beside, the sublayers of each decoder layer: Houlsby, Pfeiffer and parallel."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ...errors import ModelError
from ...recipe import BottleneckMethod
from ..bottleneck import NOT_MERGEABLE, REFUSED, BottleneckConfig
from ..load import LoadedModel
from ..structure import sublayers
from .saving import put_adapter
from .tokens import with_new_tokens

PARALLEL_SCALING = 4.0  # He et al. 2021, their best


class Bottleneck:
    """Small networks within the layers."""

    unchanged = True
    peft_type = "BOTTLENECK"
    mergeable = NOT_MERGEABLE

    def resolve(self, model: PreTrainedModel, settings: BottleneckMethod) -> BottleneckMethod:
        """With the scaling."""
        derived = PARALLEL_SCALING if settings.architecture == "parallel" else 1.0
        return settings.model_copy(update={"scaling": settings.scaling or derived})

    def attach(self, loaded: LoadedModel, settings: BottleneckMethod, *, seed: int, new_tokens: list[int]) -> nn.Module:
        """A fresh adapter. Raises ModelError where the layers are not attention and feed-forward, or PEFT cannot hold it."""
        return put_adapter(loaded.model, self.config(loaded, settings, new_tokens), seed=seed)

    def trainable(self, model: PreTrainedModel, settings: BottleneckMethod) -> int:
        """Two projections and their biases for each sublayer that has one."""
        width, places = model.config.get_text_config().hidden_size, 2 if settings.architecture == "houlsby" else 1
        return len(sublayers(model)) * places * (2 * width * settings.bottleneck_size + settings.bottleneck_size + width)

    def config(self, loaded: LoadedModel, settings: BottleneckMethod, new_tokens: list[int]) -> BottleneckConfig:
        """PEFT's config; which modules they are it finds itself."""
        if REFUSED:
            raise ModelError(REFUSED, where="method.type", mend="install PEFT 0.21, or use method lora")
        config = BottleneckConfig(
            task_type="CAUSAL_LM",
            **settings.model_dump(exclude={"type"}),
            base_model_name_or_path=loaded.identity.folder,
        )
        return with_new_tokens(config, loaded.model, new_tokens)

    def settings_of(self, config: dict[str, Any], names: list[str]) -> BottleneckMethod:
        """As they were."""
        return BottleneckMethod(**{name: config[name] for name in BottleneckMethod.model_fields if name != "type"})
