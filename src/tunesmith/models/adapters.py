"""Several named adapters on one base: which is active, and frozen ones beside the one that trains.

The base's weights are held once. `POLICY` is the adapter that trains; a copy of it as it was at the stage's start is the reference, and a
saved reward model's adapter scores. PEFT keeps them in the same layers; here one is made active for a while.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import TrainableTokensWrapper
from torch import nn

from .virtual import learns_tokens, show_new_tokens

POLICY = "default"  # the adapter that trains; PEFT's own default name, so that its folder is plain
REFERENCE = "reference"
MARKS = ("lora_", "ia3_", "bottleneck_", "trainable_tokens", "prompt_encoder")  # one of them is in the name of every adapter's parameter


@contextmanager
def active_adapter(model: nn.Module, name: str | None) -> Iterator[None]:
    """Makes a PEFT model's adapter `name` the active one, or none of them, and puts the policy's back after.

    A model without adapters is its own base: None changes nothing there. Raises KeyError for an adapter that it has not.
    """
    if not isinstance(model, PeftModel):
        if name is not None:
            raise KeyError(name)
        yield
        return
    with keeping_what_trains(model):
        if name is None:
            with _without_adapters(model), _without_new_tokens(model):
                yield
            return
        if name not in model.peft_config:
            raise KeyError(name)
        model.set_adapter(name)
        yield


@contextmanager
def _without_adapters(model: PeftModel) -> Iterator[None]:
    """For a while, no adapter computes. PEFT's own `disable_adapter` looks through every parameter for its state first, at each call."""
    if learns_tokens(model):
        with model.disable_adapter():
            yield
        return
    model.base_model.disable_adapter_layers()
    try:
        yield
    finally:
        model.base_model.enable_adapter_layers()


@contextmanager
def keeping_what_trains(model: PeftModel) -> Iterator[None]:
    """After it the policy's adapter is active again, and trains what trained before: PEFT makes trainable whatever it makes active."""
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    try:
        yield
    finally:
        if model.active_adapter != POLICY:
            model.set_adapter(POLICY)
        show_new_tokens(model)
        for parameter in model.parameters():
            parameter.requires_grad_(parameter in trained)


@contextmanager
def _without_new_tokens(model: PeftModel) -> Iterator[None]:
    """For a while, new tokens have the base's rows: PEFT leaves the trained ones in place where learned tokens are switched off."""
    rows = [module for module in model.modules() if learns_tokens(model) and isinstance(module, TrainableTokensWrapper)]
    for module in rows:
        module.enable_adapters(False)
    try:
        yield
    finally:
        for module in rows:
            module.enable_adapters(True)


def copy_policy(model: PeftModel, name: str = REFERENCE) -> None:
    """Adds a frozen copy of the policy's adapter as it is now, in fp32. A copy costs the adapter's memory, the base none."""
    with keeping_what_trains(model), torch.no_grad():
        model.add_adapter(name, model.peft_config[POLICY])
        mine = get_peft_model_state_dict(model, adapter_name=POLICY, save_embedding_layers=False)
        if learns_tokens(model):  # of a network PEFT's state is its output, and its loader fills the table alone
            encoder = model.prompt_encoder[POLICY]
            model.prompt_encoder[name].load_state_dict(encoder.state_dict())
            mine["prompt_embeddings"] = encoder.embedding.weight
        set_peft_model_state_dict(model, mine, adapter_name=name)


def adapter_parameters(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """An adapter's parameters by their names without the adapter's."""
    found = {}
    for name, parameter in model.named_parameters():
        before, own, after = name.partition(f".{adapter}")
        if own and after[:1] in ("", ".") and any(mark in before for mark in MARKS):
            found[before + after] = parameter
    return found
