"""A fast layer held against the plain one in miniature: the same module with small matrices, forward and backward.

Where a whole model computes in 16 bits, rounding alone moves gradients by some percent and hides a fault of that size. A miniature
costs nothing, so it is computed in fp32 too, in which nothing is hidden, and rounding is measured instead of guessed: in 16 bits the
fast layer may be no further from fp32 than the plain one is, up to a factor and a few roundings (LoRA's plain layer computes in fp32).
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

INPUTS, INNER, ROWS = 48, 80, 24
EXACT = 1e-4  # relative difference in fp32, where a cosine of 0.9999 would be 0.014
ROUNDING = 2.0  # times the plain layer's own error in 16 bits

Prepare = Callable[[nn.Module], None]
Forward = Callable[[nn.Module, Tensor], Tensor]


def agrees_in_miniature(module: nn.Module, fast: Forward, dtype: torch.dtype, *, prepare: Prepare | None = None) -> bool:
    """Whether `fast` computes what the module's class does, and its gradients: in fp32, and in `dtype` where that has 16 bits.

    prepare: what is done to a module before it takes the fast forward.
    """
    plain = _results(_small(module), type(module).forward, torch.float32)
    found = _results(_small(module, prepare=prepare), fast, torch.float32)
    if not all(_apart(a, b) <= EXACT for a, b in zip(found, plain, strict=True)):
        return False
    if dtype.itemsize != 2:
        return True
    exact = _results(_small(module, rounded=dtype), type(module).forward, torch.float32)
    allowed = [
        ROUNDING * _apart(a, b) + torch.finfo(dtype).eps
        for a, b in zip(_results(_small(module, dtype), type(module).forward, dtype), exact, strict=True)
    ]
    found = _results(_small(module, dtype, prepare=prepare), fast, dtype)
    return all(_apart(a, b) <= most for a, b, most in zip(found, exact, allowed, strict=True))


def _small(
    module: nn.Module, dtype: torch.dtype = torch.float32, *, rounded: torch.dtype | None = None, prepare: Prepare | None = None
) -> nn.Module:
    """The module with random matrices of its own, the same each time. rounded: the dtype whose numbers they are."""
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int, around: float = 0.0, size: float = 1.0) -> nn.Parameter:
        value = around + size * torch.randn(shape, generator=generator)
        return nn.Parameter(value.to(rounded or dtype).to(dtype))

    def linear(inputs: int, outputs: int) -> nn.Linear:
        layer = nn.Linear(inputs, outputs, device="meta")
        layer.weight, layer.bias = numbers(outputs, inputs, size=inputs**-0.5), numbers(outputs, size=0.1)
        return layer

    small = copy.copy(module)
    vars(small).update(_modules=dict(module._modules), _parameters=dict(module._parameters))
    vars(small).pop("forward", None)
    if isinstance(module, LoraLayer):
        small.base_layer = linear(INPUTS, INNER).requires_grad_(False)
        for side, shape in (("lora_A", (-1, INPUTS)), ("lora_B", (INNER, -1))):
            held = {}
            for name, one in getattr(module, side).items():
                rank = one.weight.shape[0 if side == "lora_A" else 1]
                outputs, inputs = (rank if n == -1 else n for n in shape)
                held[name] = nn.Linear(inputs, outputs, bias=False, device="meta")
                held[name].weight = nn.Parameter(torch.randn(outputs, inputs, generator=generator) * inputs**-0.5)
            setattr(small, side, nn.ModuleDict(held))
    elif hasattr(module, "gate_proj"):
        small.gate_proj, small.up_proj, small.down_proj = linear(INPUTS, INNER), linear(INPUTS, INNER), linear(INNER, INPUTS)
    else:
        small.weight = numbers(INPUTS, around=1.0, size=0.3)
    if prepare is not None:
        prepare(small)
    return small


def _results(small: nn.Module, forward: Forward, dtype: torch.dtype) -> list[Tensor]:
    """The output, and the gradients towards the input and what trains."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, INPUTS, generator=generator).bfloat16().to(dtype).requires_grad_()
    with torch.enable_grad():
        y = forward(small, x)
        grad = torch.randn(y.shape, generator=generator).bfloat16().to(y.dtype)
        trained = [p for p in small.parameters() if p.requires_grad]
        return [y.detach().float(), *(g.float() for g in torch.autograd.grad(y, [x, *trained], grad, materialize_grads=True))]


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp_min(1e-12))
