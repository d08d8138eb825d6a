"""AdamW over one flat fp32 buffer, and the learning-rate schedule in closed form.

Every trained tensor has an fp32 master in the buffer; a tensor that computes in bf16 is refreshed from it after each update, since a bf16
weight rounds most updates away. One fused kernel updates all (Loshchilov & Hutter 2019, arXiv:1711.05101).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..recipe import Stage

SAMPLE = 200_000  # weights remembered from the start, to say which share has moved


class FlatAdamW:
    """The optimiser of one stage. Weight decay applies to tensors of two or more dimensions only."""

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], stage: Stage):
        named = sorted(((n, p) for n, p in parameters if p.requires_grad), key=lambda pair: pair[1].dim() < 2)
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        sizes = [p.numel() for p in self.parameters]
        device = self.parameters[0].device
        self.flat = torch.empty(sum(sizes), dtype=torch.float32, device=device)
        self.grad = torch.zeros_like(self.flat)
        self.masters = [part.view_as(p) for part, p in zip(self.flat.split(sizes), self.parameters, strict=True)]
        self.grads = [part.view_as(p) for part, p in zip(self.grad.split(sizes), self.parameters, strict=True)]
        for parameter, master, grad in zip(self.parameters, self.masters, self.grads, strict=True):
            master.copy_(parameter.data)
            if parameter.dtype == torch.float32:
                parameter.data, parameter.grad = master, grad
            else:
                parameter.register_post_accumulate_grad_hook(_into(grad))
        matrices = sum(p.numel() for p in self.parameters if p.dim() >= 2)
        groups = []
        for low, high, decay in ((0, matrices, stage.weight_decay), (matrices, len(self.flat), 0.0)):
            if low < high:
                whole = nn.Parameter(self.flat[low:high])
                whole.grad = self.grad[low:high]
                groups.append({"params": [whole], "weight_decay": decay})
        self.adamw = torch.optim.AdamW(groups, lr=0.0, betas=(stage.adam_beta1, stage.adam_beta2), eps=stage.adam_epsilon, fused=True)
        self.max_grad_norm = stage.max_grad_norm
        self._stride = max(1, len(self.flat) // SAMPLE)
        self._start = self.flat[:: self._stride].clone()

    def zero_grad(self) -> None:
        """Sets every gradient to 0, in place."""
        self.grad.zero_()

    def grad_norm(self) -> float:
        """The Euclidean norm of all gradients."""
        return float(torch.linalg.vector_norm(self.grad))

    def step(self, learning_rate: float, norm: float) -> None:
        """One update; gradients are scaled down to max_grad_norm if `norm` is above it."""
        if self.max_grad_norm is not None and norm > self.max_grad_norm:
            self.grad.mul_(self.max_grad_norm / (norm + 1e-6))
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        self.adamw.step()
        self.publish()

    def publish(self) -> None:
        """Copies the masters into tensors that compute in another dtype."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if parameter.dtype != torch.float32:
                parameter.data.copy_(master)

    def without_gradient(self) -> list[str]:
        """Names of tensors whose gradient is exactly 0 everywhere."""
        return [name for name, grad in zip(self.names, self.grads, strict=True) if not grad.any()]

    def fraction_changed(self) -> float:
        """The share of (sampled) weights that differ from where the stage began."""
        return float((self.flat[:: self._stride] != self._start).float().mean())

    def state(self) -> dict[str, Tensor]:
        """Everything an update depends on: masters, both moments, the update count, and the remembered start."""
        tensors = {f"weight.{name}": master for name, master in zip(self.names, self.masters, strict=True)}
        tensors["start"] = self._start
        for index, group in enumerate(self.adamw.param_groups):
            for key, value in self.adamw.state[group["params"][0]].items():
                tensors[f"adamw.{index}.{key}"] = value
        return tensors

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Puts a saved state in place, bit for bit. Raises CheckpointError if names or shapes differ."""
        want = {f"weight.{name}": tuple(m.shape) for name, m in zip(self.names, self.masters, strict=True)}
        have = {name: tuple(t.shape) for name, t in tensors.items() if name.startswith("weight.")}
        if want != have:
            odd = sorted(set(want.items()) ^ set(have.items()))
            raise CheckpointError(
                f"the checkpoint's weights are not this stage's: {odd[0][0]}", mend="resume with the recipe the run began with"
            )
        for name, master in zip(self.names, self.masters, strict=True):
            master.copy_(tensors[f"weight.{name}"])
        self._start.copy_(tensors["start"])
        for index, group in enumerate(self.adamw.param_groups):
            prefix = f"adamw.{index}."
            state = {name[len(prefix) :]: t.clone() for name, t in tensors.items() if name.startswith(prefix)}
            if state:
                self.adamw.state[group["params"][0]] = state
        self.publish()


def _into(grad: Tensor):
    def add(parameter: nn.Parameter) -> None:
        grad.add_(parameter.grad)
        parameter.grad = None

    return add


def learning_rate(step: int, *, total: int, warmup: int, peak: float, kind: str) -> float:
    """The rate of update `step` (from 0) of `total`: linear warm-up from 0, then cosine or linear to 0, or constant, as in transformers."""
    if step < warmup:
        return peak * step / max(1, warmup)
    if kind == "constant":
        return peak
    progress = (step - warmup) / max(1, total - warmup)
    return peak * (max(0.0, 0.5 * (1 + math.cos(math.pi * progress))) if kind == "cosine" else max(0.0, 1 - progress))
