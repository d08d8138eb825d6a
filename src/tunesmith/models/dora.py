"""DoRA's norms, computed once where nothing trains (Liu et al. 2024, arXiv:2402.09353).

A DoRA layer scales its output by m / ||W + s B A||, a number for each output, and PEFT's forward computes that norm of the whole weight
each time. While answers are given, a token at a time, this is most of the work and always gives the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn


@contextmanager
def norms_kept(model: nn.Module) -> Iterator[None]:
    """Has each linear DoRA layer compute its norms once, in its first forward without gradients; weights may not change meanwhile."""
    layers = [module for module in model.modules() if type(module) is DoraLinearLayer and "forward" not in vars(module)]
    for layer in layers:
        layer.forward = partial(_forward, layer, {})
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _forward(
    layer: DoraLinearLayer,
    kept: dict[tuple[str, torch.dtype], Tensor],
    x: Tensor,
    *,
    lora_A: nn.Module,
    lora_B: nn.Module,
    scaling: float,
    base_layer: nn.Module,
    base_result: Tensor | None = None,
    adapter_name: str = "default",
) -> Tensor:
    """What DoRA adds to the base layer's output `base_result`: PEFT's own forward, but for the norm."""
    if base_result is None or torch.is_grad_enabled():
        words: dict[str, Any] = {"lora_A": lora_A, "lora_B": lora_B, "scaling": scaling, "base_layer": base_layer}
        return DoraLinearLayer.forward(layer, x, **words, base_result=base_result, adapter_name=adapter_name)
    scale = kept.get((adapter_name, x.dtype))
    if scale is None:
        update = layer.get_lora_weight(lora_A=lora_A, lora_B=lora_B, adapter_name=adapter_name).to(x.dtype)
        weight = dequantize_module_weight(base_layer).to(x.dtype)
        norm = layer.get_weight_norm(weight=weight, lora_weight=update, scaling=scaling, adapter_name=adapter_name)
        scale = kept[adapter_name, x.dtype] = (layer.weight / norm).view(1, -1)
    if base_layer.bias is not None:
        base_result = base_result - base_layer.bias
    return (scale - 1) * base_result + scale * lora_B(lora_A(x)) * scaling
