"""Fast paths for common layers, each exact up to rounding and each compared with the plain one before it is kept, in miniature too.

- LoRA as one matrix product over K + r (Hu et al. 2021): y = [x, s x A^T] [W, B]^T, accumulated in fp32 and rounded once; a young
  delta added to y in bf16 would be rounded away. The frozen weight lives in the wide buffer, so it is still held once; of a quantised
  base the buffer is made for a moment, in each pass.
- SwiGLU with a written-out backward; only gate and up are kept, their product is computed again for the layer after it.
- RMSNorm with a written-out backward that keeps its input only.

In bf16 on a CPU what lies between products is done by compiled loops (`kernels`), where they are available.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from . import kernels
from .miniature import agrees_in_miniature
from .quantised import dense_weight, is_held_in_bits

NORM_BLOCK = 1 << 16  # numbers that RMSNorm's backward takes at once on a CPU: its fp32 copies stay in cache


@dataclass
class FastPaths:
    """What was made fast, and what was left plain, with the reason."""

    used: dict[str, int] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def count(self, name: str) -> None:
        """Notes one more module on a fast path."""
        self.used[name] = self.used.get(name, 0) + 1


class _LoraProduct(torch.autograd.Function):
    """x[..., K], wide[N, K + r or more] = [W, B], A[r, K], B[N, r] -> x W^T + scale (x A^T) B^T; W is frozen.

    wide may be the quantised layer that holds W.
    """

    @staticmethod
    def forward(ctx, x, wide, bias, a, b, scale):  # noqa: ANN001
        flat = x.reshape(-1, x.shape[-1])
        small_a = (a * scale).to(x.dtype)
        low = flat @ small_a.T
        y = F.linear(torch.cat([flat, low], 1), _joined(wide, b, flat), bias)
        ctx.save_for_backward(flat, low, small_a, b)
        ctx.wide, ctx.scale, ctx.shape = wide, scale, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):  # noqa: ANN001
        flat, low, small_a, b = ctx.saved_tensors
        inputs = flat.shape[1]
        grad = grad.reshape(-1, grad.shape[-1])
        d_wide = grad @ _joined(ctx.wide, b, flat)
        d_low = d_wide[:, inputs:].contiguous()
        d_x = torch.addmm(d_wide[:, :inputs], d_low, small_a) if ctx.needs_input_grad[0] else None
        d_b = (grad.T @ low).to(b.dtype) if ctx.needs_input_grad[4] else None
        d_a = (d_low.T @ flat).to(b.dtype).mul_(ctx.scale) if ctx.needs_input_grad[3] else None
        return None if d_x is None else d_x.view(ctx.shape), None, None, d_a, d_b, None


def _joined(wide: Tensor | nn.Module, b: Tensor, x_TK: Tensor) -> Tensor:
    """[W, B] in the dtype of x: in the buffer that holds W, or made anew where a quantised layer does."""
    if isinstance(wide, nn.Module):
        return torch.cat([dense_weight(wide, x_TK.dtype), b.to(x_TK.dtype)], 1)
    inputs = x_TK.shape[1]
    wide = wide[:, : inputs + b.shape[1]]
    wide[:, inputs:].copy_(b)
    return wide


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up; the derivative of silu is s (1 + g (1 - s)), s the logistic function."""

    @staticmethod
    def forward(ctx, gate, up):  # noqa: ANN001
        ctx.save_for_backward(gate, up)
        return kernels.swiglu(gate, up) if kernels.fit(gate, up) else F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # noqa: ANN001
        gate, up = ctx.saved_tensors
        if kernels.fit(grad, gate, up):
            return kernels.swiglu_backward(grad, gate, up)
        silu, ctx.silu = getattr(ctx, "silu", None), None  # as the product that was computed again left it
        d_up = (F.silu(gate) if silu is None else silu).mul_(grad)
        return torch.ops.aten.silu_backward(grad * up, gate), d_up


class _RMSNorm(torch.autograd.Function):
    """x rstd(x) w in fp32, rounded as the models do; keeps x and one number a token (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    @staticmethod
    def forward(ctx, x, weight, eps):  # noqa: ANN001
        if kernels.fit(x, weight):
            out, rstd = kernels.rms_norm(x, weight, eps)
            ctx.save_for_backward(x, rstd, weight)
            return out
        out = torch.empty_like(x)
        normed = x.float()
        rstd = torch.linalg.vector_norm(normed, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, rstd, weight)
        return out.copy_(normed.mul_(rstd) if normed is not x else normed * rstd).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # noqa: ANN001
        x, rstd, weight = ctx.saved_tensors
        if kernels.fit(grad, x, weight):
            d_x, d_weight = kernels.rms_norm_backward(grad, x, rstd, weight)
            return d_x, d_weight.to(weight.dtype) if ctx.needs_input_grad[1] else None, None
        width = x.shape[-1]
        rows = max(1, NORM_BLOCK // width) if x.device.type == "cpu" else x.numel()
        d_x, wide = torch.empty(x.shape, dtype=x.dtype, device=x.device), weight.float()
        d_weight = torch.zeros_like(wide) if ctx.needs_input_grad[1] else None
        for x_part, r, g, d_part in zip(*(t.reshape(-1, t.shape[-1]).split(rows) for t in (x, rstd, grad, d_x)), strict=True):
            normed, g = x_part.float() * r, g.float()
            if d_weight is not None:
                d_weight += (g * normed).sum(0)
            g = g * wide
            along = torch.linalg.vecdot(g, normed).div_(-width).unsqueeze(-1)
            d_part.copy_(g.addcmul_(normed, along).mul_(r))
        return d_x, None if d_weight is None else d_weight.to(weight.dtype), None


def _lora_forward(self: LoraLayer, x: Tensor, *args: object, **kwargs: object) -> Tensor:
    active = [name for name in self.active_adapters if name in self.lora_A]
    if self.disable_adapters or self.merged or len(active) != 1 or args or kwargs:
        return type(self).forward(self, x, *args, **kwargs)
    (name,) = active
    a, b = self.lora_A[name].weight, self.lora_B[name].weight
    base = self.get_base_layer()
    given = (x, getattr(self, "wide", base), base.bias, a, b, self.scaling[name])
    if x.requires_grad or a.requires_grad or b.requires_grad:
        return _LoraProduct.apply(*given)
    return _LoraProduct.forward(_NoContext(), *given)


class _NoContext:
    """Stands where autograd's context would, when nothing is differentiated."""

    def save_for_backward(self, *tensors: Tensor) -> None:
        """Keeps nothing."""


def is_plain(layer: LoraLayer) -> bool:
    """Whether an adapter layer computes x W^T + s (x A^T) B^T and nothing else: no dropout, no DoRA, no bias of its own."""
    base = layer.get_base_layer()
    return (
        (type(base) is nn.Linear or is_held_in_bits(base))
        and not base.weight.requires_grad
        and not layer.lora_variant
        and all(isinstance(d, nn.Identity) for d in layer.lora_dropout.values())
        and all(m.bias is None for m in layer.lora_B.values())
        and not layer.fan_in_fan_out
    )


def _widen(layer: LoraLayer) -> None:
    """Puts the frozen weight into a buffer that has room for B."""
    base = layer.get_base_layer()
    rank = max(m.weight.shape[0] for m in layer.lora_A.values())
    outputs, inputs = base.weight.shape
    wide = torch.empty(outputs, inputs + rank, dtype=base.weight.dtype, device=base.weight.device)
    wide[:, :inputs] = base.weight.data
    layer.wide = wide
    base.weight.data = wide[:, :inputs]


def fuse_lora(model: nn.Module, paths: FastPaths) -> None:
    """Gives every plain LoRA layer of the model the one-product forward."""
    trials: dict[tuple[Any, ...], bool] = {}
    for name, layer in model.named_modules():
        if not (isinstance(layer, LoraLayer) and isinstance(layer.get_base_layer(), nn.Linear | Conv1D)):
            continue
        if not is_plain(layer):
            paths.refused.setdefault("lora", f"{name} is not a plain LoRA layer")
            continue
        kind = (type(layer), *sorted(layer.scaling.items()))
        if kind not in trials:
            trials[kind] = agrees_in_miniature(layer, _lora_forward, _dtype(layer), prepare=_widen)
        if not trials[kind]:
            paths.refused.setdefault("lora", f"{name} computes something else")
            continue
        if not is_held_in_bits(layer.get_base_layer()):
            _widen(layer)
        layer.forward = types.MethodType(_lora_forward, layer)
        paths.count("lora")


def _swiglu_forward(self: nn.Module, x: Tensor) -> Tensor:
    gate, up = self.gate_proj(x), self.up_proj(x)
    if torch.compiler.is_compiling():  # what is kept is then the compiler's choice
        return self.down_proj(F.silu(gate) * up)
    inner = _SwiGLU.apply(gate, up)
    if not inner.requires_grad or torch._C._autograd._top_saved_tensors_default_hooks(True):
        return self.down_proj(inner)  # also where checkpointing says what is kept: hooks of ours in its own would keep gate and up
    gate, up, node = gate.detach(), up.detach(), inner.grad_fn

    def keep(saved: Tensor) -> Tensor | torch.Size:
        return saved.shape if saved.data_ptr() == inner.data_ptr() and saved.numel() == inner.numel() else saved

    def again(kept: Tensor | torch.Size) -> Tensor:
        if not isinstance(kept, torch.Size):
            return kept
        if kernels.fit(gate, up):
            return kernels.swiglu(gate, up).view(kept)
        node.silu = F.silu(gate)  # for SwiGLU's own backward pass, which comes next
        return (node.silu * up).view(kept)

    with torch.autograd.graph.saved_tensors_hooks(keep, again):  # down_proj would save `inner`; gate and up are saved already
        return self.down_proj(inner)


def _rms_forward(self: nn.Module, x: Tensor) -> Tensor:
    return _RMSNorm.apply(x, self.weight, self.variance_epsilon)


def fuse_layers(model: nn.Module, paths: FastPaths) -> None:
    """Gives RMSNorm and SwiGLU modules of the usual form their fast forward."""
    for module, forward in fast_forwards(model, paths).items():
        module.forward = forward


def fast_forwards(model: nn.Module, paths: FastPaths) -> dict[nn.Module, types.MethodType]:
    """The fast forwards of RMSNorm and SwiGLU modules of the usual form; each kind is tried against its own forward first."""
    first = next(model.parameters())
    if first.device.type == "cpu" and _dtype(model) == torch.bfloat16:
        if reason := kernels.unavailable():
            paths.refused["kernels"] = reason
        else:
            paths.count("kernels")
    found: dict[nn.Module, types.MethodType] = {}
    trials: dict[type, bool] = {}
    for module in model.modules():
        fast = _candidate(module)
        if fast is None:
            continue
        name, forward, width = fast
        if type(module) not in trials:
            trials[type(module)] = _agrees(module, forward, width) and agrees_in_miniature(module, forward, _dtype(module))
            if not trials[type(module)]:
                paths.refused[name] = f"{type(module).__name__} computes something else"
        if trials[type(module)]:
            found[module] = types.MethodType(forward, module)
            paths.count(name)
    return found


def keep_plain(model: nn.Module) -> None:
    """Has a model take its own layers from here on, whoever computes with it."""
    model.tunesmith_plain = True


def is_kept_plain(model: nn.Module) -> bool:
    """Whether `keep_plain` was said of a model."""
    return getattr(model, "tunesmith_plain", False)


@contextmanager
def taking(forwards: Mapping[nn.Module, types.MethodType]) -> Iterator[None]:
    """For a while, modules take the given forwards; those that have one already keep it."""
    given = {module: forward for module, forward in forwards.items() if "forward" not in vars(module)}
    for module, forward in given.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in given:
            del module.forward


def remove_fast_forwards(model: nn.Module) -> dict[nn.Module, types.MethodType]:
    """Gives every fast module its class's forward again. Returns what was removed."""
    removed = {}
    for module in model.modules():
        forward = vars(module).get("forward")
        if isinstance(forward, types.MethodType) and forward.__func__ in (_lora_forward, _swiglu_forward, _rms_forward):
            removed[module] = forward
            del module.forward
    return removed


@contextmanager
def plain_layers(model: nn.Module) -> Iterator[None]:
    """For a while, every layer takes its own forward."""
    removed = remove_fast_forwards(model)
    try:
        yield
    finally:
        for module, forward in removed.items():
            module.forward = forward


def _candidate(module: nn.Module) -> tuple[str, types.FunctionType, int] | None:
    if all(isinstance(getattr(module, part, None), nn.Module) for part in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        return "swiglu", _swiglu_forward, _inputs(module.gate_proj)
    if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon") and getattr(module, "weight", None) is not None:
        return "rms_norm", _rms_forward, module.weight.shape[-1]
    return None


def _inputs(layer: nn.Module) -> int:
    return (layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer).in_features


def _agrees(module: nn.Module, forward: types.FunctionType, width: int) -> bool:
    """Whether the fast forward equals the module's own on random rows: to 1e-4 relative in fp32, 2e-2 in bf16."""
    dtype, device = _dtype(module), next(module.parameters()).device
    x = torch.randn(4, width, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    with torch.no_grad():
        want, got = module(x).float(), forward(module, x).float()
    bound = 1e-4 if dtype == torch.float32 else 2e-2
    return bool((want - got).abs().max() <= bound * want.abs().max())


def _dtype(module: nn.Module) -> torch.dtype:
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)  # a quantised layer may have none
