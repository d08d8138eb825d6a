"""A decoder layer's attention and feed-forward, found by watching one tiny forward pass and not by names.

Attention goes through transformers' interface, so that a function of ours there sees when it happens: linear layers called before it are
its inputs, the first after it is its output, and the rest is the feed-forward. What does not fit exactly is refused and not guessed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import ModelError
from .layout import backbone_of, layers_of

TRACE = "tunesmith_trace"


@dataclass(frozen=True)
class Sublayers:
    """The linear layers of one decoder layer, by their full names in the model, in the order in which they are called."""

    layer: str
    """The decoder layer's own name."""
    attention_inputs: tuple[str, ...]
    """Queries, keys and values, together or apart."""
    attention_output: str
    feedforward_inputs: tuple[str, ...]
    """One, or gate and up."""
    feedforward_output: str


@dataclass(frozen=True)
class _Call:
    """One call of a linear layer, with the tensor that it reads and the width of what it gives; or of attention, which has neither."""

    module: nn.Module
    source: Tensor | None = None
    width: int | None = None


_calls: ContextVar[list[_Call]] = ContextVar("calls")


def _mark(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **extra: Any) -> tuple[Tensor, None]:
    """In attention's place: query[B, Hq, T, D], value[B, Hkv, T, Dv] -> zeros [B, T, Hq, Dv]."""
    _calls.get().append(_Call(module))
    return value.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None


AttentionInterface.register(TRACE, _mark)


def sublayers(model: PreTrainedModel) -> list[Sublayers]:
    """Attention and feed-forward of every decoder layer, in order. The model is left as it was, also where it carries adapters.

    Raises ModelError where a layer is something else: experts held as one tensor, other parts than linear layers, no attention.
    """
    names = {module: name for name, module in model.named_modules()}
    calls = [(names[call.module], call) for call in _trace(model)]
    width = model.config.get_text_config().hidden_size
    return [
        _split(names[layer], layer, [(name, call) for name, call in calls if name.startswith(f"{names[layer]}.")], width)
        for layer in layers_of(backbone_of(model))
    ]


def _trace(model: PreTrainedModel) -> list[_Call]:
    """What is called, in order, while the backbone reads two tokens."""
    backbone, calls = backbone_of(model), []

    def note(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        calls.append(_Call(module, given[0], output.shape[-1]))

    hooks = [linear.register_forward_hook(note) for linear in _linear_layers(backbone)]
    token = _calls.set(calls)
    try:
        with torch.no_grad(), _watched(model):
            tokens = torch.zeros(1, 2, dtype=torch.long, device=model.device)
            backbone(inputs_embeds=backbone.get_input_embeddings()(tokens), use_cache=False)
    finally:
        _calls.reset(token)
        for hook in hooks:
            hook.remove()
    return calls


@contextmanager
def _watched(model: PreTrainedModel) -> Iterator[None]:
    """For a while, attention is marked and not computed, and no dropout draws a number."""
    before, training = model.config._attn_implementation, [module for module in model.modules() if module.training]
    model.set_attn_implementation(TRACE)
    model.eval()
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        for module in training:
            module.training = True


def _linear_layers(root: nn.Module) -> Iterator[nn.Module]:
    """The linear layers below a module; one with adapters on it is one, whatever it holds."""
    last = None
    for name, module in root.named_modules():
        base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
        if isinstance(base, nn.Linear | Conv1D) and not (last and name.startswith(f"{last}.")):
            last = name
            yield module


def _split(prefix: str, layer: nn.Module, calls: list[tuple[str, _Call]], width: int) -> Sublayers:
    """A layer's calls, by name, as attention and feed-forward. width: of the hidden state."""
    linear = [name for name, call in calls if call.source is not None]
    for weight, parameter in layer.named_parameters(prefix):
        if parameter.dim() > 1 and not any(weight.startswith(f"{name}.") for name in linear):
            _refuse(prefix, f"{weight} belongs to no linear layer that is called")
    if len(calls) - len(linear) != 1 or len(set(linear)) != len(linear):
        _refuse(prefix, "attention, or one of its linear layers, is not called once")
    at = next(i for i, (_, call) in enumerate(calls) if call.source is None)
    before, after = calls[:at], calls[at + 1 :]
    if len(before) < 1 or len(after) < 3:
        _refuse(prefix, f"it calls {len(before)} linear layers before attention and {len(after)} after it")
    (output, attended), (out, last) = after[0], after[-1]
    into = after[1:-1]
    if any(call.source is not into[0][1].source for _, call in into) or not attended.width == last.width == width:
        _refuse(prefix, f"after attention it calls {', '.join(name for name, _ in after)}")
    return Sublayers(prefix, tuple(name for name, _ in before), output, tuple(name for name, _ in into), out)


def _refuse(prefix: str, why: str) -> None:
    raise ModelError(f"the layer is not attention and one feed-forward of linear layers: {why}", where=prefix, mend="use method lora")
