"""Where a model's parts lie, and whether several rows may be computed in one pass: what its config says, before it is run."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..errors import ModelError

KNOWN_LAYERS = {"full_attention", "sliding_attention"}
# Rotary scalings whose frequencies depend on the longest row of a pass, so that a row would depend on its batch.
LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}


def backbone_of(model: PreTrainedModel) -> nn.Module:
    """The part of a causal language model that gives hidden states. Raises ModelError where the model names none."""
    backbone = getattr(model, model.base_model_prefix, None)
    if not isinstance(backbone, nn.Module):
        raise ModelError(
            f"{type(model).__name__} has no backbone apart from its head (`{model.base_model_prefix}`)",
            where="model.name",
            mend="tune another model family",
        )
    return backbone


def layers_of(backbone: nn.Module) -> nn.ModuleList:
    """The backbone's layers, in order. Raises ModelError where it has no list of them."""
    for module in backbone.modules():
        if isinstance(module, nn.ModuleList) and len(module) > 0:
            return module
    raise ModelError("the model has no list of layers", where=type(backbone).__name__, mend="tune another model family")


def unpackable_reason(config: Any) -> str | None:
    """Why rows of a model with this config cannot be computed together as if each were alone, or None."""
    config = config.get_text_config()
    other_layers = set(getattr(config, "layer_types", None) or []) - KNOWN_LAYERS
    if other_layers:
        return f"layers of type {', '.join(sorted(other_layers))}"
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {part.get("rope_type") for part in [rope, *rope.values()] if isinstance(part, dict)}
    if kinds & LENGTH_DEPENDENT_ROPE:
        return "its rotary embedding depends on the longest row of a batch"
    return None
