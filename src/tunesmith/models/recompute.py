"""Activation memory for time: layers whose inside is computed again in the backward pass (Chen et al. 2016, arXiv:1604.06174).

All of them: the least memory, about a third more time. `selective`, every second one: half of what is saved, at half of that price.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

from torch import nn
from torch.utils.checkpoint import checkpoint

from .attention import current_layout, forest_layout
from .layout import layers_of


def recompute_layers(backbone: nn.Module, which: Literal[True, "selective"]) -> None:
    """Lets the transformer layers of a backbone be computed again in the backward pass, in the batch's own layout."""
    for layer in layers_of(backbone)[:: 2 if which == "selective" else 1]:
        layer.forward = partial(_again, layer.forward)


def _again(plain: Any, *args: Any, **kwargs: Any) -> Any:
    nodes = current_layout()
    return checkpoint(plain, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), forest_layout(nodes)), **kwargs)
