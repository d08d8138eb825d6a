"""The linear layers of a model by name: which an adapter stands on, and which of several names match."""

from __future__ import annotations

import difflib

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ...errors import RecipeError
from ..layout import backbone_of


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The backbone's linear layers by name."""
    return {name: module for name, module in backbone_of(model).named_modules() if isinstance(module, nn.Linear | Conv1D)}


def matches(name: str, target: str) -> bool:
    """Whether a module's full name is the target, or ends with it."""
    return name == target or name.endswith(f".{target}")


def target_modules(model: PreTrainedModel, wanted: list[str] | str | None, *, where: str = "method.target_modules") -> list[str]:
    """The names of the linear layers that get an adapter. Each of `wanted` must match at least one, by full name or last part(s).

    None or "all-linear": every linear layer of the backbone. Raises RecipeError with the nearest names.
    """
    linear = linear_layers(model)
    if wanted is None or wanted == "all-linear":
        return sorted({name.rsplit(".", 1)[-1] for name in linear})
    for target in wanted:
        if not any(matches(name, target) for name in linear):
            known = sorted({name.rsplit(".", 1)[-1] for name in linear})
            near = difflib.get_close_matches(target, known, n=3, cutoff=0.4) or known
            raise RecipeError(f"`{target}` matches no linear layer of the model", where=where, mend=f"nearest names: {', '.join(near)}")
    return sorted(wanted)
