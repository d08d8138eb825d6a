"""LoRA and its variants on PEFT's modules."""

from __future__ import annotations

import math
from typing import Any

from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel

from ...errors import RecipeError
from ...recipe import LoraMethod
from ..load import LoadedModel
from .saving import put_adapter
from .starts import start_at_principal_part, start_orthogonal
from .targets import layer_size, target_modules, targeted, turned
from .tokens import with_new_tokens


class Lora:
    """Low-rank updates of linear layers."""

    unchanged = True
    mergeable = None
    peft_type = "LORA"

    def resolve(self, model: PreTrainedModel, settings: LoraMethod) -> LoraMethod:
        """With alpha and targets."""
        alpha = settings.lora_alpha if settings.lora_alpha is not None else 2.0 * settings.r
        targets = target_modules(model, settings.target_modules)
        smallest = min(min(layer_size(layer)) for layer in targeted(model, targets).values())
        if settings.init_lora_weights == "pissa" and settings.r > smallest:
            raise RecipeError(
                f"a weight of {smallest} rows or columns has no principal part of rank {settings.r}",
                where="method.r",
                mend=f"r: {smallest}, or less; or other target_modules",
            )
        return settings.model_copy(update={"lora_alpha": alpha, "target_modules": targets})

    def attach(self, loaded: LoadedModel, settings: LoraMethod, *, seed: int, new_tokens: list[int]) -> nn.Module:
        """A fresh adapter."""
        model = put_adapter(loaded.model, self.config(loaded, settings, new_tokens), seed=seed)
        if settings.init_lora_weights == "orthogonal":
            start_orthogonal(model)
        elif settings.init_lora_weights == "pissa":
            start_at_principal_part(model)
        return model

    def trainable(self, model: PreTrainedModel, settings: LoraMethod) -> int:
        """r numbers for each input and output of each target; of DoRA also a length for each output."""
        sizes = [layer_size(layer) for layer in targeted(model, settings.target_modules).values()]
        return sum(settings.r * (inputs + outputs) + (outputs if settings.use_dora else 0) for inputs, outputs in sizes)

    def config(self, loaded: LoadedModel, settings: LoraMethod, new_tokens: list[int]) -> LoraConfig:
        """PEFT's config. PiSSA's update and its start are one plain LoRA of twice the rank at the same scale (`starts.py`)."""
        rank, alpha = settings.r, settings.lora_alpha
        if settings.init_lora_weights == "pissa":
            rank, alpha = 2 * rank, alpha * (math.sqrt(2) if settings.use_rslora else 2)
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=rank,
            lora_alpha=alpha,
            lora_dropout=settings.lora_dropout,
            use_rslora=settings.use_rslora,
            use_dora=settings.use_dora,
            target_modules=settings.target_modules,
            fan_in_fan_out=turned(loaded.model, settings.target_modules),
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
            use_dora=config.get("use_dora", False),
            target_modules=sorted(targets),
        )


def learning_rate_scales(model: nn.Module, method: Any) -> dict[str, float]:
    """By what the learning rate is multiplied for trained parameters that have one of their own, by the names that `model` gives them.

    LoRA+ (arXiv:2402.12354): that of B, and nothing else.
    """
    if not isinstance(method, LoraMethod) or method.loraplus_lr_ratio == 1.0:
        return {}
    return {
        name: method.loraplus_lr_ratio for name, parameter in model.named_parameters() if parameter.requires_grad and ".lora_B." in name
    }
