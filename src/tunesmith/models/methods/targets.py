"""The linear layers of a model by name: which an adapter stands on, and which of several names match."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ...errors import RecipeError
from ..layout import backbone_of

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # where a config says among how many a router chooses


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The backbone's linear layers by name."""
    return {name: module for name, module in backbone_of(model).named_modules() if isinstance(module, nn.Linear | Conv1D)}


def layer_size(layer: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a linear layer, however its weight is held."""
    return tuple(layer.weight.shape) if isinstance(layer, Conv1D) else (layer.in_features, layer.out_features)


def matches(name: str, target: str) -> bool:
    """Whether a module's full name is the target, or ends with it."""
    return name == target or name.endswith(f".{target}")


def targeted(model: PreTrainedModel, targets: Collection[str]) -> dict[str, nn.Module]:
    """The linear layers that the names match."""
    return {name: layer for name, layer in linear_layers(model).items() if any(matches(name, target) for target in targets)}


def turned(model: PreTrainedModel, targets: Collection[str]) -> bool:
    """Whether the targets hold their weights as [inputs, outputs], as GPT-2's do."""
    return any(isinstance(layer, Conv1D) for layer in targeted(model, targets).values())


def is_router(model: PreTrainedModel, layer: nn.Module) -> bool:
    """Whether a layer chooses among a mixture's experts, or weighs a shared one: it has an output an expert, or a single one.

    An update of it would change which experts a token goes to, and with it far more than an update of low rank is meant to.
    """
    config = model.config.get_text_config()
    experts = next((count for count in (getattr(config, name, None) for name in EXPERTS) if count), None)
    return experts is not None and layer_size(layer)[1] in (1, experts)


def target_modules(model: PreTrainedModel, wanted: list[str] | str | None, *, where: str = "method.target_modules") -> list[str]:
    """The names of the linear layers that get an adapter. Each of `wanted` must match at least one, by full name or last part(s).

    None or "all-linear": every linear layer of the backbone but a mixture-of-experts router. Raises RecipeError with the nearest names, and
    for a router.
    """
    linear = linear_layers(model)
    routers = {name for name, layer in linear.items() if is_router(model, layer)}
    if wanted is None or wanted == "all-linear":
        last = {name.rsplit(".", 1)[-1] for name in linear.keys() - routers}
        clash = {part for part in last if any(matches(name, part) for name in routers)}
        return sorted((last - clash) | {name for name in linear.keys() - routers if name.rsplit(".", 1)[-1] in clash})
    for target in wanted:
        found = [name for name in linear if matches(name, target)]
        require_match(found, target, linear, "linear layer", where)
        if routers.intersection(found):
            raise RecipeError(
                f"`{target}` is a mixture-of-experts router: an update of it changes which experts a token goes to",
                where=where,
                mend="leave it out; all-linear does",
            )
    return sorted(wanted)


def require_match(found: Collection[str], target: str, names: Iterable[str], kind: str, where: str) -> None:
    """Raises RecipeError with the names nearest to the target, where nothing was found for it."""
    if found:
        return
    known = sorted({name.rsplit(".", 1)[-1] for name in names if name})
    near = difflib.get_close_matches(target, known, n=3, cutoff=0.4) or known
    raise RecipeError(f"`{target}` matches no {kind} of the model", where=where, mend=f"nearest names: {', '.join(near)}")
