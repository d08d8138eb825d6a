"""Activations kept in the host's memory between the forward and the backward pass; a model's own weights stay where they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

from ..errors import RecipeError


def require_device(stage: str) -> None:
    """Raises RecipeError where there is no GPU whose memory could be spared."""
    if not torch.cuda.is_available():
        raise RecipeError(
            "activation_offload needs a CUDA device, and this machine has none; what it saves and costs is NOT MEASURED",
            where=f"stages.{stage}.activation_offload",
            mend="leave it out, or set gradient_checkpointing",
        )


def offloaded(model: nn.Module, *, pin: bool = True) -> saved_tensors_hooks:
    """A context in which what autograd saves is moved to the host, into pinned memory, and comes back when it is needed."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    host = save_on_cpu(pin_memory=pin)

    def pack(saved: Tensor) -> Any:
        return saved if saved.untyped_storage().data_ptr() in own else host.pack_hook(saved)

    def unpack(kept: Any) -> Tensor:
        return kept if isinstance(kept, Tensor) else host.unpack_hook(kept)

    return saved_tensors_hooks(pack, unpack)
