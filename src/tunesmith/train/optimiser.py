"""AdamW with fp32 masters (Loshchilov & Hutter 2019, arXiv:1711.05101), and the learning-rate schedule in closed form.

Every trained weight has an fp32 master, since a bf16 weight rounds most updates away. Tensors held in fp32 are their own masters and lie in
one flat buffer, which one fused kernel updates. A bf16 tensor is the upper half of its master: the other 16 bits lie in `rest`, so that
weight and master take 4 bytes and not 6; it is updated a block at a time, joined, changed and split again while in the processor's cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from ..errors import CheckpointError
from ..recipe import Stage

SAMPLE = 200_000  # weights remembered from the start, to say which share has moved
BLOCK = 1 << 17  # bf16 weights updated at once: 512 KiB a buffer, which stays in cache
TIE = (1 << 15) - 1  # a master halfway between two bf16 values may be rounded down; its rest then does not fit 16 bits by one and is cut


class FlatAdamW:
    """The optimiser of one stage. Weight decay applies to tensors of two or more dimensions only.

    The gradient of a bf16 tensor is left in bf16 after a window's first batch, and the others' are added to it in fp32.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], stage: Stage):
        named = sorted(
            ((n, p) for n, p in parameters if p.requires_grad), key=lambda pair: (pair[1].dtype != torch.float32, pair[1].dim() < 2)
        )
        self.stage = stage
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        sizes = [p.numel() for p in self.parameters]
        device = self.parameters[0].device
        self._whole = [p for p in self.parameters if p.dtype == torch.float32]
        self._halved = self.parameters[len(self._whole) :]
        whole = sizes[: len(self._whole)]
        halved = sizes[len(self._whole) :]
        self.flat = torch.empty(sum(whole), dtype=torch.float32, device=device)
        self.grad = torch.zeros(sum(whole), dtype=torch.float32, device=device)
        self.rest = torch.zeros(sum(halved), dtype=torch.int16, device=device)
        self.first, self.second = (torch.zeros(sum(sizes), dtype=torch.float32, device=device) for _ in range(2))
        self.updates = torch.zeros((), dtype=torch.float32, device=device)
        self._masters = [part.view_as(p) for part, p in zip(self.flat.split(whole), self._whole, strict=True)]
        self._rests = list(self.rest.split(halved))
        self._moments = list(zip(self.first.split(sizes), self.second.split(sizes), strict=True))
        self.gradients: list[Tensor | None] = [part.view_as(p) for part, p in zip(self.grad.split(whole), self._whole, strict=True)]
        for parameter, master, grad in zip(self._whole, self._masters, self.gradients, strict=True):
            master.copy_(parameter.data)
            parameter.data, parameter.grad = master, grad
        for index, parameter in enumerate(self._halved, len(self._whole)):
            self.gradients.append(None)
            parameter.register_post_accumulate_grad_hook(partial(self._gather, index))
        self.max_grad_norm = stage.max_grad_norm
        self._stride = max(1, sum(sizes) // SAMPLE)
        self._start = self._sample()

    @property
    def masters(self) -> list[Tensor]:
        """Every trained tensor in fp32, in the order of `names`; a bf16 tensor's is a copy."""
        return self._masters + [_join(p.data.flatten(), rest).view_as(p) for p, rest in zip(self._halved, self._rests, strict=True)]

    def start_from(self, stored: Iterable[tuple[str, Tensor]]) -> None:
        """Gives masters the bits that loading in bf16 dropped: `stored` are fp32 values by name, taken where they round to the weight held.

        A master that begins exactly at a bf16 value moves that weight only after half a bf16 step: the first updates would do nothing.
        """
        halved = dict(zip(self.names[len(self._whole) :], zip(self._halved, self._rests, strict=True), strict=True))
        for name, value in stored:
            parameter, rest = halved.get(name, (None, None))
            if parameter is None or value.dtype != torch.float32 or value.shape != parameter.shape:
                continue
            value = value.to(parameter.device)
            if torch.equal(value.to(parameter.dtype), parameter.data):
                rest.copy_(_rest(value.flatten(), parameter.data.flatten()))
        self._start = self._sample()

    def zero_grad(self) -> None:
        """Sets every gradient to 0."""
        self.grad.zero_()
        self.gradients[len(self._whole) :] = [None] * len(self._halved)

    def _gather(self, index: int, parameter: nn.Parameter) -> None:
        """Takes what a backward pass left in a bf16 parameter, so that the next one's is not added to it in bf16."""
        held, new = self.gradients[index], parameter.grad
        parameter.grad = None
        self.gradients[index] = new if held is None else held.float().add_(new)

    def grad_norm(self) -> float:
        """The Euclidean norm of all gradients."""
        squares = float(torch.linalg.vector_norm(self.grad)) ** 2
        for grad in self.gradients[len(self._whole) :]:
            if grad is not None:
                squares += sum(float(torch.linalg.vector_norm(part.float())) ** 2 for part in grad.view(-1).split(BLOCK))
        return math.sqrt(squares)

    def step(self, learning_rate: float, norm: float) -> None:
        """One update; gradients are scaled down to max_grad_norm if `norm` is above it."""
        scale = 1.0
        if self.max_grad_norm is not None and norm > self.max_grad_norm:
            scale = self.max_grad_norm / (norm + 1e-6)
        if scale != 1.0:
            self.grad.mul_(scale)
        matrices, whole = sum(p.numel() for p in self._whole if p.dim() >= 2), len(self.flat)
        for a, b in ((0, matrices), (matrices, whole)):
            if a < b:
                self._adamw(self.flat[a:b], self.grad[a:b], self.first[a:b], self.second[a:b], learning_rate, matrix=b == matrices)
        for index in range(len(self._whole), len(self.parameters)):
            self._step_halved(index, learning_rate, scale)
        self.updates += 1

    def _step_halved(self, index: int, learning_rate: float, scale: float) -> None:
        parameter, grad = self.parameters[index], self.gradients[index]
        if grad is None:
            return
        parts = (parameter.data, self._rests[index - len(self._whole)], grad, *self._moments[index])
        for held, rest, g, first, second in zip(*(part.view(-1).split(BLOCK) for part in parts), strict=True):
            master = _join(held, rest)
            self._adamw(master, g.float().mul_(scale), first, second, learning_rate, matrix=parameter.dim() >= 2)
            held.copy_(master)
            rest.copy_(_rest(master, held))

    def _adamw(self, master: Tensor, grad: Tensor, first: Tensor, second: Tensor, learning_rate: float, *, matrix: bool) -> None:
        stage = self.stage
        adamw(
            [master],
            [grad],
            [first],
            [second],
            [],
            [self.updates.clone()],
            fused=True,
            amsgrad=False,
            maximize=False,
            lr=learning_rate,
            beta1=stage.adam_beta1,
            beta2=stage.adam_beta2,
            eps=stage.adam_epsilon,
            weight_decay=stage.weight_decay if matrix else 0.0,
        )

    def without_gradient(self) -> list[str]:
        """Names of tensors whose gradient is exactly 0 everywhere."""
        return [name for name, grad in zip(self.names, self.gradients, strict=True) if grad is None or not grad.any()]

    def fraction_changed(self) -> float:
        """The share of (sampled) weights that differ from where the stage began."""
        return float((self._sample() != self._start).float().mean())

    def _sample(self) -> Tensor:
        parts = [master.flatten()[:: self._stride] for master in self._masters]
        parts += [
            _join(p.data.flatten()[:: self._stride], rest[:: self._stride]) for p, rest in zip(self._halved, self._rests, strict=True)
        ]
        return torch.cat(parts)

    def state(self) -> dict[str, Tensor]:
        """Everything an update depends on: masters (bf16 ones in two halves), both moments, the update count, and the remembered start."""
        tensors = {"start": self._start, "adamw.first": self.first, "adamw.second": self.second, "adamw.updates": self.updates}
        return tensors | dict(self._weights())

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, held in zip(self.names, [*self._masters, *(p.data for p in self._halved)], strict=True):
            yield f"weight.{name}", held
        for name, rest in zip(self.names[len(self._whole) :], self._rests, strict=True):
            yield f"rest.{name}", rest

    def load_weights(self, tensors: dict[str, Tensor]) -> None:
        """Puts a saved state's weights in place, and nothing else."""
        for name, held in self._weights():
            held.copy_(tensors[name])

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Puts a saved state in place, bit for bit. Raises CheckpointError if names or shapes differ."""
        want = {name: tuple(held.shape) for name, held in self._weights()}
        have = {name: tuple(t.shape) for name, t in tensors.items() if name.startswith(("weight.", "rest."))}
        if want != have:
            odd = sorted(set(want.items()) ^ set(have.items()))
            raise CheckpointError(
                f"the checkpoint's weights are not this stage's: {odd[0][0]}", mend="resume with the recipe the run began with"
            )
        self.load_weights(tensors)
        self._start.copy_(tensors["start"])
        for name, held in (("first", self.first), ("second", self.second), ("updates", self.updates)):
            held.copy_(tensors[f"adamw.{name}"])


def _join(held: Tensor, rest: Tensor) -> Tensor:
    """The fp32 values whose upper halves, rounded, are the bf16 tensor, and whose lower halves are int16."""
    return held.float().view(torch.int32).add_(rest.to(torch.int32)).view(torch.float32)


def _rest(master: Tensor, held: Tensor) -> Tensor:
    """What `_join` needs besides the bf16 tensor to give the master back: numbers of 16 bits, held in 32."""
    upper = held.float().view(torch.int32)
    return torch.sub(master.view(torch.int32), upper, out=upper).clamp_(max=TIE)


def learning_rate(step: int, *, total: int, warmup: int, peak: float, kind: str) -> float:
    """The rate of update `step` (from 0) of `total`: linear warm-up from 0, then cosine or linear to 0, or constant, as in transformers."""
    if step < warmup:
        return peak * step / max(1, warmup)
    if kind == "constant":
        return peak
    progress = (step - warmup) / max(1, total - warmup)
    return peak * (max(0.0, 0.5 * (1 + math.cos(math.pi * progress))) if kind == "cosine" else max(0.0, 1 - progress))
