"""IA3 (Liu et al. 2022, arXiv:2205.05638) on PEFT's modules: learned scales of keys, values and inner activations."""

from __future__ import annotations

from typing import Any

from peft import IA3Config
from torch import nn
from transformers import PreTrainedModel

from ...errors import RecipeError
from ...recipe import Ia3Method
from ..load import LoadedModel
from .saving import put_adapter
from .targets import layer_size, linear_layers, matches, target_modules, targeted, turned
from .tokens import with_new_tokens

# Names of model families' layers. PEFT's own table has queries in place of keys for some of them, which is not the paper's method.
KEYS_AND_VALUES = ("k_proj", "v_proj", "key", "value", "query_key_value", "c_attn", "qkv_proj", "Wqkv")
LAST_OF_FEED_FORWARD = ("down_proj", "fc2", "mlp.c_proj", "dense_4h_to_h", "fc_out", "w2")


class Ia3:
    """Scales of what some linear layers give, or take."""

    unchanged = True
    mergeable = None
    peft_type = "IA3"

    def resolve(self, model: PreTrainedModel, settings: Ia3Method) -> Ia3Method:
        """With targets, and which of them are scaled in their input."""
        linear = linear_layers(model)
        given = settings.target_modules
        if given is None:
            keys, last = ([n for n in names if targeted(model, [n])] for names in (KEYS_AND_VALUES, LAST_OF_FEED_FORWARD))
            if not keys or not last:
                known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linear}))
                raise RecipeError(
                    f"which layers of {model.config.model_type} give keys and values, and which end a feed-forward part, is not known",
                    where="method.target_modules",
                    mend=f"name them, and the latter in feedforward_modules too; it has {known}",
                )
            given = keys + last
        targets = target_modules(model, given)
        inner = settings.feedforward_modules
        if inner is None:
            ends = targeted(model, LAST_OF_FEED_FORWARD)
            inner = [target for target in targets if any(matches(name, target) for name in ends)]
        unknown = sorted(set(inner) - set(targets))
        if unknown:
            raise RecipeError(
                f"`{unknown[0]}` is none of the target modules", where="method.feedforward_modules", mend=f"one of: {', '.join(targets)}"
            )
        return settings.model_copy(update={"target_modules": targets, "feedforward_modules": sorted(inner)})

    def attach(self, loaded: LoadedModel, settings: Ia3Method, *, seed: int, new_tokens: list[int]) -> nn.Module:
        """A fresh adapter: every scale is 1."""
        return put_adapter(loaded.model, self.config(loaded, settings, new_tokens), seed=seed)

    def trainable(self, model: PreTrainedModel, settings: Ia3Method) -> int:
        """A number for each output of a target; for each input where the input is scaled."""
        inner = targeted(model, settings.feedforward_modules)
        layers = targeted(model, settings.target_modules)
        return sum(layer_size(layer)[0 if name in inner else 1] for name, layer in layers.items())

    def config(self, loaded: LoadedModel, settings: Ia3Method, new_tokens: list[int]) -> IA3Config:
        """PEFT's config."""
        config = IA3Config(
            task_type="CAUSAL_LM",
            target_modules=settings.target_modules,
            feedforward_modules=settings.feedforward_modules,
            fan_in_fan_out=turned(loaded.model, settings.target_modules),
            base_model_name_or_path=loaded.identity.folder,
        )
        return with_new_tokens(config, loaded.model, new_tokens)

    def settings_of(self, config: dict[str, Any], names: list[str]) -> Ia3Method:
        """As PEFT wrote them; where the targets are a pattern, those that the tensors name."""
        targets, inner = config["target_modules"], config["feedforward_modules"]
        if isinstance(targets, str):
            targets = {name.split(".ia3_l")[0].rsplit(".", 1)[-1] for name in names if ".ia3_l" in name}
        return Ia3Method(target_modules=sorted(targets), feedforward_modules=None if isinstance(inner, str) else sorted(inner))
