"""Full and partial tuning: the model's own parameters train, and the result is a whole model."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from ...errors import RecipeError
from ...recipe import FullMethod, PartialMethod
from ..layout import backbone_of, layers_of
from ..load import LoadedModel
from ..quantised import require_dense
from .targets import matches, require_match


class Full:
    """Every parameter trains."""

    unchanged = True
    mergeable = None

    def resolve(self, model: PreTrainedModel, settings: FullMethod) -> FullMethod:
        """Nothing is derived. Raises RecipeError on a quantised base."""
        require_dense(model, settings.type)
        return settings

    def attach(self, loaded: LoadedModel, settings: FullMethod, *, seed: int, new_tokens: list[int]) -> nn.Module:
        """All parameters, in the dtype they are held in; the optimiser keeps fp32 masters."""
        loaded.model.requires_grad_(True)
        return loaded.model

    def trainable(self, model: PreTrainedModel, settings: FullMethod) -> int:
        """All of them."""
        return sum(p.numel() for p in model.parameters())


class Partial:
    """Named modules train, or the last layers with the norm after them."""

    unchanged = True
    mergeable = None

    def resolve(self, model: PreTrainedModel, settings: PartialMethod) -> PartialMethod:
        """Nothing is derived. Raises RecipeError where a name or the layers are not there, for a tied head, and on a quantised base."""
        require_dense(model, settings.type)
        _trained(model, settings)
        return settings

    def attach(self, loaded: LoadedModel, settings: PartialMethod, *, seed: int, new_tokens: list[int]) -> nn.Module:
        """Their parameters, in the dtype they are held in. Raises RecipeError where new tokens' embeddings would stay as they are."""
        model = loaded.model.requires_grad_(False)
        for parameter in _trained(model, settings):
            parameter.requires_grad_(True)
        if new_tokens and not all(e.weight.requires_grad for e in (model.get_input_embeddings(), model.get_output_embeddings())):
            raise RecipeError(
                "the chat template's new tokens have embeddings that would not train",
                where="method.modules",
                mend="name the embeddings too, and the head where it is apart; or use another method",
            )
        return model

    def trainable(self, model: PreTrainedModel, settings: PartialMethod) -> int:
        """What the named modules hold, tied tensors once."""
        return sum(p.numel() for p in _trained(model, settings))


def _trained(model: PreTrainedModel, settings: PartialMethod) -> list[nn.Parameter]:
    """The parameters that train, each once."""
    names = [name for name, module in model.named_modules() if any(True for _ in module.parameters())]
    modules: list[nn.Module] = []
    for target in settings.modules or ():
        found = [name for name in names if matches(name, target)]
        require_match(found, target, names, "module", "method.modules")
        modules += map(model.get_submodule, found)
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head in modules and embeddings not in modules and head.weight is embeddings.weight:
        name = next(name for name, module in model.named_modules() if module is embeddings).rsplit(".", 1)[-1]
        raise RecipeError(
            "the head's weight is that of the embeddings: one cannot train without the other",
            where="method.modules",
            mend=f"name {name}, with which the head trains; or leave it out",
        )
    if settings.last_layers is not None:
        modules += _last_layers(model, settings.last_layers)
    return list({id(p): p for module in modules for p in module.parameters()}.values())


def _last_layers(model: PreTrainedModel, count: int) -> list[nn.Module]:
    """The model's last layers, and the norm after them: the last of the norms that stand beside the layers."""
    backbone = backbone_of(model)
    layers = layers_of(backbone)
    if count > len(layers):
        raise RecipeError(
            f"the model has {len(layers)} layers, and not {count}", where="method.last_layers", mend="lower it, or use method full"
        )
    beside = next(module for module in backbone.modules() if any(child is layers for child in module.children()))
    norms = [child for child in beside.children() if "norm" in type(child).__name__.lower()]
    return [*layers[-count:], *norms[-1:]]
