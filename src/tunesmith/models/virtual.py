"""Learned tokens before every row: what prompt tuning, P-tuning and prefix tuning put there, as PEFT's prompt encoders hold it.

Prompt tuning and P-tuning learn embeddings, which the model computes like any token's; prefix tuning learns each layer's keys and values,
which get no rotary embedding. Either way a row's own tokens begin at position n, as in PEFT's forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel, PeftType
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import AdapterError

NETWORK = "prompt_encoder.safetensors"  # beside the adapter: what made its embeddings, where that is more than a table

KeysValues = list[tuple[Tensor, Tensor]]
"""A pair [Hkv, n, D] a layer."""


@dataclass(frozen=True)
class Virtual:
    """The learned tokens of the active adapter, through which gradients flow. One of `embeddings_NH` and `prefix` is there."""

    count: int
    embeddings_NH: Tensor | None = None
    prefix: KeysValues | None = None


def learns_tokens(model: nn.Module) -> bool:
    """Whether an adapter of the model is learned tokens."""
    return isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning


def virtual_count(model: nn.Module) -> int:
    """How many learned tokens the active adapter puts before every row."""
    if not learns_tokens(model) or not model.has_active_enabled_adapter:
        return 0
    return model.active_peft_config.num_virtual_tokens


def virtual_tokens(model: nn.Module, dtype: torch.dtype) -> Virtual | None:
    """The active adapter's learned tokens in the dtype that the model computes in; None where it has none."""
    count = virtual_count(model)
    if not count:
        return None
    config, encoder = model.active_peft_config, model.prompt_encoder[model.active_adapter]
    with torch.backends.cudnn.flags(enabled=False):  # its LSTM has no backward pass in evaluation mode
        learned = encoder.embedding.weight if config.inference_mode else encoder(torch.arange(count, device=model.device)[None])[0]
    learned = learned.to(dtype)
    if config.peft_type != PeftType.PREFIX_TUNING:
        return Virtual(count, embeddings_NH=learned)
    flat = learned.view(count, 2 * config.num_layers, config.num_attention_heads, -1).permute(1, 2, 0, 3)
    return Virtual(count, prefix=[(flat[2 * i], flat[2 * i + 1]) for i in range(config.num_layers)])


def has_network(model: PeftModel, adapter: str) -> bool:
    """Whether an adapter's tokens are made by a network at hand, and not read from a table."""
    return learns_tokens(model) and len(list(model.prompt_encoder[adapter].parameters())) > 1


def save_network(model: PeftModel, adapter: str, folder: Path) -> None:
    """Writes what makes an adapter's tokens beside them, so that a later stage can go on: PEFT's file holds its output alone."""
    if has_network(model, adapter):
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.prompt_encoder[adapter].state_dict().items()}
        save_file(state, folder / NETWORK)


def load_network(model: PeftModel, adapter: str, learned: Tensor, folder: Path) -> Tensor:
    """Puts a saved network into an adapter that trains on; gives the network's own table, which is where PEFT would put `learned`.

    Raises AdapterError unless it makes the saved tokens `learned` [n, *].
    """
    encoder, path = model.prompt_encoder[adapter], folder / NETWORK
    if not path.is_file():
        what = f"no {NETWORK}: the network that made its tokens is not there, and from its output alone it cannot be trained on"
        raise AdapterError(what, where=str(folder), mend="start from the base, or from a result that tunesmith saved")
    try:
        encoder.load_state_dict(load_file(path), strict=True)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise AdapterError(f"the network cannot be read: {error}", where=str(path), mend="take an intact copy") from error
    with torch.no_grad():
        made = encoder(torch.arange(len(learned), device=model.device)[None])[0].cpu()
    if not torch.allclose(made, learned.float(), rtol=1e-3, atol=1e-4 * float(learned.abs().max())):
        raise AdapterError("the network does not make the tokens that were saved with it", where=str(path), mend="take an intact copy")
    return encoder.embedding.weight.detach()


def show_new_tokens(model: PeftModel) -> None:
    """Has PEFT's forward look tokens up where new ones have rows of their own: it holds the embeddings as they were before those."""
    if learns_tokens(model):
        model.word_embeddings = model.get_base_model().get_input_embeddings()
