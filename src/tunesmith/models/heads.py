"""Linear heads on the hidden state: a reward model's score and a policy's value; made, saved beside the adapter and loaded again.

A result that has heads holds `heads.safetensors`, each `NAME.weight` float32 [1, H].
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..errors import AdapterError

HEADS = "heads.safetensors"


def make_head(width: int, *, seed: int | None, device: torch.device | str = "cpu") -> nn.Linear:
    """A head of one number on `width` hidden units, fp32, without bias: zero, or normal with deviation 1 / sqrt(width + 1) from a seed.

    The random start is that of a reward model's score in Stiennon et al. 2020 (arXiv:2009.01325).
    """
    head = nn.Linear(width, 1, bias=False, dtype=torch.float32)
    with torch.no_grad():
        if seed is None:
            head.weight.zero_()
        else:
            head.weight.normal_(0.0, (width + 1) ** -0.5, generator=torch.Generator().manual_seed(seed))
    return head.to(device)


def save_heads(heads: nn.ModuleDict, folder: Path) -> None:
    """Writes a result's heads, where it has any, and reads them back. Raises AdapterError if the file is not what is held."""
    state = {f"{name}.weight": head.weight.detach().cpu().contiguous() for name, head in heads.items()}
    if not state:
        return
    save_file(state, folder / HEADS)
    again = load_file(folder / HEADS)
    if state.keys() != again.keys() or not all(torch.equal(state[name], again[name]) for name in state):
        raise AdapterError("the written heads do not read back as those in memory", where=str(folder), mend="check the disk")


def load_heads(folder: Path, width: int) -> nn.ModuleDict:
    """All heads that a result has, frozen, by name; on the conditions of `load_head`."""
    names = [name.removesuffix(".weight") for name in _stored(folder)]
    return nn.ModuleDict({name: load_head(folder, name, width) for name in names})


def load_head(folder: Path, name: str, width: int) -> nn.Linear:
    """A saved head, frozen. Raises AdapterError where the result has none of that name, or one of another width."""
    weight = _stored(folder).get(f"{name}.weight")
    if weight is None:
        raise AdapterError(f"there is no `{name}` head", where=str(folder), mend="name the result of a stage with objective reward")
    if tuple(weight.shape) != (1, width):
        raise AdapterError(
            f"the `{name}` head is of shape {tuple(weight.shape)}, the model needs {(1, width)}",
            where=str(folder / HEADS),
            mend="put it on the base that it was trained on",
        )
    head = make_head(width, seed=None)
    head.weight.data = weight.float()
    return head.requires_grad_(False)


def _stored(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / HEADS
    try:
        return load_file(path) if path.is_file() else {}
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"the heads cannot be read: {error}", where=str(path), mend="train it again, or take an intact copy") from error
