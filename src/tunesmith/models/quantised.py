"""Bases held in 4 or 8 bits by bitsandbytes: NF4 (QLoRA, Dettmers et al. 2023, arXiv:2305.14314) and int8 a row (arXiv:2208.07339).

Storage is bitsandbytes', the product is ours: x W^T with the dense W that the stored bits stand for, made for a moment, in the forward
pass and again in the backward one. So a token's output depends on nothing but that token, its gradient is exact, and both are the same
on every device. bitsandbytes' own products would not do: int8 rounds the activations, with outliers chosen over all rows of a batch, and
NF4 on some processors packs the weights anew in the first pass without gradients, after which there are none.
"""

from __future__ import annotations

import copy
import importlib.util
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import ModelError, RecipeError


def quantization_config(kind: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """How transformers loads a base in nf4 or int8; the head and the embeddings stay dense. Raises ModelError without bitsandbytes."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError("a quantised base needs bitsandbytes", where="model.quantization", mend="pip install tunesmith[quant]")
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)


def is_quantised(model: nn.Module) -> bool:
    """Whether a model's linear layers are held in 4 or 8 bits."""
    return getattr(model, "quantization_method", None) is not None


def is_held_in_bits(layer: nn.Module) -> bool:
    """Whether it is a linear layer whose weight is held in 4 or 8 bits."""
    return isinstance(layer, nn.Linear) and not layer.weight.is_floating_point()


def require_dense(model: PreTrainedModel, method: str) -> None:
    """A method that changes the base's own weights needs them dense. Raises RecipeError."""
    if is_quantised(model):
        raise RecipeError(
            f"{method} tuning changes the base's weights, which a quantised base holds in too few bits for an update",
            where="model.quantization",
            mend="leave model.quantization out, or use an adapter (method: lora)",
        )


def compute_densely(model: PreTrainedModel) -> None:
    """Gives every quantised layer the product with its dense weight. Raises ModelError where the head was quantised."""
    head = model.get_output_embeddings()
    if head is not None and not head.weight.is_floating_point():
        raise ModelError("the head of this model was quantised", where=model.config.model_type, mend="leave model.quantization out")
    for module in model.modules():
        if is_held_in_bits(module):
            module.forward = types.MethodType(_forward, module)


def leave_the_file(model: PreTrainedModel) -> None:
    """Copies what stayed dense out of the weights' mapped file: one tensor of it keeps all its pages, the dense base's, in memory."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def dense_weight(layer: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    """A linear layer's weight [N, K] in a dtype, or its own: as it is, turned where it lies turned, or what its bits stand for."""
    weight = layer.weight.data
    if isinstance(layer, Conv1D):
        weight = weight.T
    elif weight.dtype == torch.int8:
        scale = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
        weight = weight.to(dtype or torch.float32).mul_((scale / 127).to(dtype or torch.float32)[:, None])
    elif not weight.is_floating_point():
        weight = _from_four_bits(weight, layer.weight.quant_state)
    return weight if dtype is None else weight.to(dtype)


def _from_four_bits(bits: Tensor, state: Any) -> Tensor:
    """The matrix that bitsandbytes' four bits stand for.

    Rows are laid flat where they are no whole number of blocks: its kernel for AVX-512 takes the wrong block's scale there (0.50.2).
    """
    from bitsandbytes.functional import dequantize_4bit

    if state.shape[-1] % state.blocksize == 0:
        return dequantize_4bit(bits, state)
    flat = copy.copy(state)
    flat.shape = torch.Size([state.shape.numel()])
    return dequantize_4bit(bits, flat).view(state.shape)


class _Product(torch.autograd.Function):
    """x[..., K] -> x W^T + b; keeps nothing but the layer, whose weight is frozen."""

    @staticmethod
    def forward(ctx, x, layer):  # noqa: ANN001
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return F.linear(x, dense_weight(layer, x.dtype), bias)

    @staticmethod
    def backward(ctx, grad):  # noqa: ANN001
        return grad @ dense_weight(ctx.layer, grad.dtype), None


def _forward(self: nn.Module, x: Tensor) -> Tensor:
    return _Product.apply(x, self)
