"""LoRA and its variants on PEFT's modules."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel

from ...recipe import LoraMethod
from ..load import LoadedModel
from .saving import put_adapter
from .targets import linear_layers, matches, target_modules
from .tokens import with_new_tokens


class Lora:
    """Low-rank updates of linear layers."""

    unchanged = True
    mergeable = None
    peft_type = "LORA"

    def resolve(self, model: PreTrainedModel, settings: LoraMethod) -> LoraMethod:
        """With alpha and targets."""
        alpha = settings.lora_alpha if settings.lora_alpha is not None else 2.0 * settings.r
        return settings.model_copy(update={"lora_alpha": alpha, "target_modules": target_modules(model, settings.target_modules)})

    def attach(self, loaded: LoadedModel, settings: LoraMethod, *, seed: int, new_tokens: list[int]) -> nn.Module:
        """A fresh adapter."""
        return put_adapter(loaded.model, self.config(loaded, settings, new_tokens), seed=seed)

    def trainable(self, model: PreTrainedModel, settings: LoraMethod) -> int:
        """r numbers for each input and output of each target."""
        targets = [m for name, m in linear_layers(model).items() if any(matches(name, target) for target in settings.target_modules)]
        return sum(settings.r * sum(module.weight.shape) for module in targets)

    def config(self, loaded: LoadedModel, settings: LoraMethod, new_tokens: list[int]) -> LoraConfig:
        """PEFT's config."""
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=settings.r,
            lora_alpha=settings.lora_alpha,
            lora_dropout=settings.lora_dropout,
            use_rslora=settings.use_rslora,
            target_modules=settings.target_modules,
            base_model_name_or_path=loaded.identity.folder,
        )
        return with_new_tokens(config, loaded.model, new_tokens)

    def settings_of(self, config: dict[str, Any], names: list[str]) -> LoraMethod:
        """As PEFT wrote them; where the targets are a pattern ("all-linear" or a regex), those that the tensors name."""
        targets = config["target_modules"]
        if isinstance(targets, str):
            targets = {name.split(".lora_A")[0].rsplit(".", 1)[-1] for name in names if ".lora_A" in name}
        return LoraMethod(
            r=config["r"],
            lora_alpha=float(config["lora_alpha"]),
            lora_dropout=config.get("lora_dropout", 0.0),
            use_rslora=config.get("use_rslora", False),
            target_modules=sorted(targets),
        )
