"""How a LoRA update starts: orthogonal, or from the weight's principal part (PiSSA, Meng et al. 2024, arXiv:2404.02948), base untouched.

PiSSA trains B A from the principal part s B0 A0 of W, on the base W - s B0 A0. Here the base stays W, so that it is the reference and
others' adapters stand on it too: the update is s (B A - B0 A0), which with A = A0 + a and B = B0 + b is

    s [b, B0] [A0 + a; a]

a plain LoRA of rank 2r, of which a and b train, from 0. A fresh one is 0 exactly, young changes are not lost beside large numbers in bf16,
and weight decay draws to the base. It is saved as that plain LoRA, which anyone loads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..adapters import POLICY
from ..quantised import dense_weight


def lora_layers(model: nn.Module) -> list[LoraLayer]:
    """The layers that carry a policy's update."""
    return [module for module in model.modules() if isinstance(module, LoraLayer) and POLICY in module.lora_A]


@torch.no_grad()
def start_orthogonal(model: nn.Module) -> None:
    """A and B random with B A = 0, as PEFT's `orthogonal` start draws them, in fp32 whatever the base is held in; of even rank."""
    for layer in lora_layers(model):
        a, b = layer.lora_A[POLICY].weight, layer.lora_B[POLICY].weight
        rank = len(a)
        rows_rr, _ = torch.linalg.qr(torch.randn(rank, rank))
        a.copy_(torch.randn(layer.in_features, rank // 2).mm(rows_rr[0::2]).T / 10)
        b.copy_(torch.randn(rank // 2, layer.out_features).T.mm(rows_rr[1::2]) / 10)


def start_at_principal_part(model: nn.Module) -> None:
    """Of a fresh LoRA of rank 2r, r ranks train, from the weight's principal part."""
    for layer in lora_layers(model):
        rank = layer.r[POLICY] // 2
        a, b = principal_part(dense_weight(layer.get_base_layer()), rank, layer.scaling[POLICY])
        _split(layer, a, b, torch.zeros_like(a), torch.zeros_like(b))


def hold_start(model: nn.Module) -> None:
    """Of a saved one of rank 2r, r ranks train again, from where they were, and the start is held."""
    for layer in lora_layers(model):
        upper_a, lower_a = layer.lora_A[POLICY].weight.data.chunk(2)
        left_b, right_b = layer.lora_B[POLICY].weight.data.chunk(2, 1)
        _split(layer, upper_a - lower_a, right_b, lower_a, left_b)


@torch.no_grad()
def principal_part(weight_NK: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A0 [r, K] and B0 [N, r] in fp32: scale B0 A0 is the best approximation of that rank, its singular values shared between the two.

    From the eigenvectors of the smaller Gram matrix in fp64: to fp32's rounding that of a whole decomposition, at a part of its time.
    """
    if weight_NK.shape[0] > weight_NK.shape[1]:
        b, a = principal_part(weight_NK.T, rank, scale)
        return a.T.contiguous(), b.T.contiguous()
    weight_NK = weight_NK.double()
    squares_N, vectors_NN = torch.linalg.eigh(weight_NK @ weight_NK.T)
    size_r = squares_N[-rank:].clamp(min=torch.finfo(torch.float64).tiny).sqrt()
    left_Nr = vectors_NN[:, -rank:]
    a = (left_Nr.T @ weight_NK) / (size_r * scale).sqrt()[:, None]
    return a.float(), (left_Nr * (size_r / scale).sqrt()).float()


class _Half(nn.Module):
    """Stands for PEFT's linear layer of rank 2r: its weight is made of `change`, which trains, and of `start`, which does not."""

    bias = None

    def __init__(self, start: Tensor, change: Tensor, *, outer: bool):
        super().__init__()
        self.outer = outer
        self.change = nn.Parameter(change.clone())
        self.register_buffer("start", start.clone(), persistent=False)

    @property
    def weight(self) -> Tensor:
        """A [2r, K], or B [N, 2r] of the outer half."""
        return torch.cat([self.change, self.start], 1) if self.outer else torch.cat([self.start + self.change, self.change])

    def forward(self, x: Tensor) -> Tensor:
        """x W^T."""
        return F.linear(x, self.weight)

    def _save_to_state_dict(self, destination, prefix, keep_vars):  # noqa: ANN001
        destination[f"{prefix}weight"] = self.weight if keep_vars else self.weight.detach()


def _split(layer: LoraLayer, start_a: Tensor, start_b: Tensor, change_a: Tensor, change_b: Tensor) -> None:
    device = layer.lora_A[POLICY].weight.device
    layer.lora_A[POLICY] = _Half(start_a, change_a, outer=False).to(device)
    layer.lora_B[POLICY] = _Half(start_b, change_b, outer=True).to(device)
