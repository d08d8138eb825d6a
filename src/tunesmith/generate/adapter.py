"""LoRA merged into the base weights for the while, and taken out again without a trace.

Takes a PEFT model, gives nothing: inside the context its plain LoRA layers cost one matrix product instead of three. PEFT's own
merge and unmerge add and subtract, which in bf16 does not give back the weights; here a copy of them is put back, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.lora import Linear as LoraLinear


@contextmanager
def merged_adapter(model: torch.nn.Module) -> Iterator[None]:
    """Adds every plain LoRA layer's update to its base weight, in place, in float32; restores the weights exactly afterwards.

    A layer counts as merged in PEFT's sense meanwhile (`layer.merged`), so its forward is its base layer's. Left as they are, and still
    right: layers of other kinds (DoRA and the like, embeddings), quantised ones, those with a LoRA bias, switched-off ones, and those whose
    weight another module shares (a tied head). A model without LoRA passes through. Costs a copy of the touched weights in memory.
    """
    saved: list[tuple[LoraLinear, torch.Tensor, list[str]]] = []
    shared = _shared_storage(model)
    try:
        for layer in model.modules():
            if isinstance(layer, LoraLinear) and _is_plain(layer) and layer.base_layer.weight.data_ptr() not in shared:
                weight = layer.base_layer.weight.data
                saved.append((layer, weight.clone(), list(layer.merged_adapters)))
                active = [name for name in layer.active_adapters if name in layer.lora_A]
                merged = weight.float()
                for name in active:
                    merged = merged + layer.get_delta_weight(name).detach().float()
                weight.copy_(merged)
                layer.merged_adapters.extend(active)
        yield
    finally:
        for layer, weight, merged_adapters in saved:
            layer.base_layer.weight.data.copy_(weight)
            layer.merged_adapters[:] = merged_adapters


def _is_plain(layer: LoraLinear) -> bool:
    """Whether base weight + scaled B A is all that the layer's active adapters do."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if not active or layer.disable_adapters or layer.merged or not layer.base_layer.weight.is_floating_point():
        return False
    return not any(name in layer.lora_variant or layer.lora_bias.get(name) for name in active)


def _shared_storage(model: torch.nn.Module) -> set[int]:
    """Addresses of weights that more than one module holds."""
    seen: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            seen[parameter.data_ptr()] = seen.get(parameter.data_ptr(), 0) + 1
    return {address for address, count in seen.items() if count > 1}
