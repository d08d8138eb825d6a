"""Which parameters train, one file a family; how the result is saved and strictly loaded again.

model = attach(loaded, settings, seed=0)    # what trains is trainable, everything else frozen
save_result(model, loaded, folder, card)    # a plain PEFT adapter or a plain transformers model
model = load_adapter(loaded, folder)        # all tensors, on their own base, or AdapterError
"""

from __future__ import annotations

from pathlib import Path

from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from ...errors import AdapterError
from ...recipe import FullMethod, LoraMethod, Method
from ..load import LoadedModel
from ..result import ADAPTER_WEIGHTS, is_adapter, read_adapter_config, read_card
from ._kind import AdapterKind, MethodKind
from .bottleneck import Bottleneck
from .ia3 import Ia3
from .lora import Lora, learning_rate_scales
from .prompt import Prefix, Prompt, PTuning
from .saving import add_adapter, load_adapter, save_result, trainable_state
from .starts import hold_start
from .targets import target_modules
from .whole import Full, Partial

METHOD_KINDS: dict[str, MethodKind] = {
    "full": Full(),
    "partial": Partial(),
    "lora": Lora(),
    "ia3": Ia3(),
    "prefix": Prefix(),
    "prompt": Prompt(),
    "p_tuning": PTuning(),
    "bottleneck": Bottleneck(),
}
ADAPTERS: dict[str, AdapterKind] = {kind.peft_type: kind for kind in METHOD_KINDS.values() if hasattr(kind, "peft_type")}

__all__ = [
    "ADAPTERS",
    "METHOD_KINDS",
    "add_adapter",
    "attach",
    "continue_adapter",
    "learning_rate_scales",
    "load_adapter",
    "method_of",
    "resolve",
    "save_result",
    "starts_unchanged",
    "target_modules",
    "trainable_count",
    "trainable_state",
]


def resolve(model: PreTrainedModel, method: Method) -> Method:
    """The method with every derived setting written out. Raises RecipeError where a name matches nothing of the model."""
    return METHOD_KINDS[method.type].resolve(model, method)


def attach(loaded: LoadedModel, method: Method, *, seed: int, new_tokens: list[int] | None = None) -> nn.Module:
    """Makes the method's parameters trainable, in fp32 for adapters, and everything else frozen. Returns the model to train.

    new_tokens: ids whose embeddings train besides (a base model's new chat tokens). Raises RecipeError if a target matches nothing.
    """
    return METHOD_KINDS[method.type].attach(loaded, resolve(loaded.model, method), seed=seed, new_tokens=new_tokens or [])


def continue_adapter(loaded: LoadedModel, method: Method, folder: Path) -> nn.Module:
    """A saved adapter on its base, whose parameters train again. Raises AdapterError."""
    model = load_adapter(loaded, folder, trainable=True)
    if getattr(method, "init_lora_weights", None) == "pissa":
        hold_start(model)
    return model


def trainable_count(model: PreTrainedModel, method: Method) -> int:
    """How many numbers a resolved method trains in a model, without putting it there."""
    return METHOD_KINDS[method.type].trainable(model, method)


def starts_unchanged(method: Method) -> bool:
    """Whether a fresh one leaves the model's output as it was."""
    return METHOD_KINDS[method.type].unchanged


def method_of(start: Path | None) -> Method:
    """What a stage trains where its recipe names no method: that of what it starts from; LoRA on a bare base."""
    if start is None:
        return LoraMethod()
    if not is_adapter(start):
        return FullMethod()
    saved = read_card(start).get("method")
    if saved is not None:
        return TypeAdapter(Method).validate_python(saved)
    config = read_adapter_config(start)
    kind = ADAPTERS.get(config.get("peft_type"))
    if kind is None:
        mend = f"known: {', '.join(sorted(ADAPTERS))}"
        raise AdapterError(f"an adapter of type {config.get('peft_type')}, which is not known", where=str(start), mend=mend)
    try:
        with safe_open(start / ADAPTER_WEIGHTS, "pt") as weights:
            names = list(weights.keys())
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"the adapter cannot be read: {error}", where=str(start), mend="it needs whole weights") from error
    return kind.settings_of(config, names)
