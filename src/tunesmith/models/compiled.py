"""A transformer layer compiled by torch.compile, once for all of them, where FlexAttention is used and gradients are formed.

What a layer must know of the batch is given to it as an argument, since the compiler cannot look into a context. It is compiled for any
number of tokens at once, so that what computes a batch does not hang on which came first. Passes without gradients, few tokens and learned
prefixes take the plain layer, since each would be compiled again.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.forest import Forest, build_forest
from .attention import current_layout
from .fused import FastPaths
from .layout import layers_of

COMPILED = "compiled_layer"  # among the fast paths
FEW_TOKENS = 128  # FlexAttention's block: a mask of one block is compiled apart from those of more
REASON = 200  # characters of the compiler's own words
Hidden = Callable[[Tensor, Forest], Tensor]  # hidden states [T, H] of input embeddings [1, T, H]
Plain = Callable[[], AbstractContextManager[None]]  # while it is open, layers are the plain ones
AGREES = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.1}  # relative, of the whole tensor


class CompiledLayer:
    """A layer's forward, which is compiled where that pays."""

    def __init__(self, plain: Callable[..., Any], backend: Any):
        self.plain, self.compiled = plain, torch.compile(plain, fullgraph=True, dynamic=True, backend=backend)

    def __call__(self, hidden_1TH: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer's outputs."""
        layout = current_layout()
        if layout is None or not layout.masks or layout.prefix or not torch.is_grad_enabled() or hidden_1TH.shape[1] <= FEW_TOKENS:
            return self.plain(hidden_1TH, *args, **kwargs)
        return self.compiled(hidden_1TH, *args, layout=layout, **kwargs)


def compile_layers(backbone: nn.Module, hidden: Hidden, plainly: Plain, paths: FastPaths, backend: Any = "inductor") -> None:
    """Gives a backbone on FlexAttention compiled layers, if what they compute and differentiate is what the plain ones do."""
    layers = layers_of(backbone)
    plain = [layer.forward for layer in layers]
    for layer, forward in zip(layers, plain, strict=True):
        layer.forward = CompiledLayer(forward, backend)
    try:
        reason = None if _agrees(backbone, hidden, plainly) else "it computes something else"
    except Exception as error:  # no compiler, or a layer that it does not take whole: torch raises whatever it pleases
        reason = f"it does not run: {' '.join(str(error).split())[:REASON] or type(error).__name__}"
    if reason is None:
        paths.used[COMPILED] = len(layers)
        return
    paths.refused[COMPILED] = reason
    for layer, forward in zip(layers, plain, strict=True):
        layer.forward = forward


def _agrees(backbone: nn.Module, hidden: Hidden, plainly: Plain) -> bool:
    """Whether hidden states, and the gradient towards the embeddings, are the plain layers' up to rounding, on two random rows."""
    embed = backbone.get_input_embeddings()
    ids = np.random.default_rng(0).integers(0, embed.weight.shape[0], (2, FEW_TOKENS))
    forest = build_forest([(row, np.zeros(len(row), dtype=np.float32)) for row in ids])
    inputs = embed(torch.from_numpy(forest.tokens_T).to(embed.weight.device)[None]).detach().requires_grad_()

    toward_TH = torch.randn(inputs.shape[1:], generator=torch.Generator().manual_seed(0)).to(inputs.device, inputs.dtype)

    def computed() -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            hidden_TH = hidden(inputs, forest)
            return hidden_TH.detach(), torch.autograd.grad(hidden_TH, inputs, toward_TH)[0]

    found = computed()
    with plainly():
        plain = computed()
    return all(float((a - b).float().norm() / b.float().norm()) <= AGREES[inputs.dtype] for a, b in zip(found, plain, strict=True))
