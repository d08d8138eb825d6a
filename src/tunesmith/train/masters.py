"""Where trained weights lie, in fp32 or so that fp32 can be had: parameters, their gradients, and what a rule remembers of them.

Every trained weight has an fp32 master, since a 16-bit weight rounds most updates away. Tensors held in fp32 are their own masters and
lie in one flat buffer, a `Run` of which one call updates. The others stand `Apart`: a bf16 tensor is the upper half of its master, or one
more, and the other 16 bits lie in `low`, so that weight and master take 4 bytes and not 6; an fp16 tensor, with an exponent of its own,
has its master beside it (6 bytes); of a tensor that is sharded over processes (a DTensor), this process's part is updated, and nothing is
laid flat.

A bf16 weight is not its master's nearest value: from a model stored in bf16 all masters begin at one, and an update of 2e-5 would move no
weight of 0.1 for a dozen updates, and then many at once. Each weight is rounded up from a threshold of its own, of which every share of a
step is the limit for as many weights (stochastic rounding with fixed draws): as many weights move by a step as the update is of it.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ..models import kernels
from .updates import Moment, Rule
from .updates.adamw import AdamW

UPDATE_BLOCK = {"cpu": 1 << 18, "cuda": 1 << 23}
"""bf16 weights updated at once where the rule allows it: 1 MiB a buffer on a processor, so that most stays in cache, and 32 on a GPU."""

LOW = 0xFFFF  # what of a master's bits a bf16 weight does not hold
NAN = 0x7FFF0000  # above it, rounding would make of CUDA's NaN a number
GOLDEN = 0x9E3779B1  # 2^32 over the golden ratio: multiples of it lie evenly, every few of them (Weyl 1916)

Piece = tuple[Tensor, Tensor, dict[str, Tensor]]
"""A master, its gradient, and what the rule remembers of it."""


def local(tensor: Tensor) -> Tensor:
    """What of a tensor lies in this process: all of it, or of a DTensor its shard, in the same memory."""
    held = tensor.detach()
    return held.to_local() if isinstance(held, DTensor) else held


def _block(held: Tensor) -> int:
    return UPDATE_BLOCK.get(held.device.type, UPDATE_BLOCK["cuda"])


class Run:
    """fp32 tensors side by side in the flat buffer, moved by one rule at one rate: one tensor, or any number where each of theirs moves by
    itself."""

    def __init__(self, named: list[tuple[str, nn.Parameter]], masters: Tensor, gradients: Tensor, rule: Rule):
        self.names, self.parameters = [name for name, _ in named], [parameter for _, parameter in named]
        self.rule = rule
        shape = masters.shape if rule.group == 1 else self.parameters[0].shape
        self.master, self.gradient = masters.view(shape), gradients.view(shape)
        self.memory = rule.remember(shape, masters.device)
        self.masters = self._cut(self.master)
        for parameter, master, gradient in zip(self.parameters, self.masters, self._cut(self.gradient), strict=True):
            master.copy_(parameter.data)
            parameter.data, parameter.grad = master, gradient

    def _cut(self, joined: Tensor) -> list[Tensor]:
        if self.rule.group != 1:
            return [joined]
        parts = joined.split([p.numel() for p in self.parameters])
        return [part.view(p.shape) for part, p in zip(parts, self.parameters, strict=True)]

    def pieces(self, factor: float) -> Iterator[Piece]:
        """What the rule is to move, the gradient multiplied by a factor."""
        gradient = self.gradient.mul_(factor) if factor != 1.0 else self.gradient
        if self.rule.group == 1:  # in one call
            yield self.master, gradient, self.memory
            return
        for master, grad, *memory in _blocks(self.rule, self.master, gradient, *self.memory.values()):
            yield master, grad, dict(zip(self.memory, memory, strict=True))

    def move(self, factor: float, moment: Moment) -> None:
        """One update, the gradient multiplied by a factor."""
        _move(self, factor, moment)

    def sample(self, stride: int) -> Tensor:
        """Every so-manieth weight."""
        return self.master.flatten()[::stride].clone()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors that give the weights, as they are to be kept."""
        for name, master in zip(self.names, self.masters, strict=True):
            yield f"weight.{name}", master

    def remembered(self) -> Iterator[tuple[str, Tensor]]:
        """What the rule remembers, by tensor."""
        for kind, held in self.memory.items():
            for name, part in zip(self.names, self._cut(held), strict=True):
                yield f"{kind}.{name}", part


class Apart:
    """One tensor with a gradient of its own: 16 bits wide, or sharded.

    The gradient is left as it comes after a window's first batch, and the others' are added to it in fp32.
    """

    def __init__(self, name: str, parameter: nn.Parameter, rule: Rule):
        self.names, self.parameters, self.rule = [name], [parameter], rule
        self.sharded = isinstance(parameter, DTensor)
        self.gradient: Tensor | None = None
        held = local(parameter)
        self.low = torch.zeros(held.shape, dtype=torch.int16, device=held.device) if held.dtype == torch.bfloat16 else None
        self.place = _place(parameter)
        self.copy = held.float() if held.dtype == torch.float16 else None
        self.memory = rule.remember(held.shape, held.device)
        me = weakref.ref(self)  # a hook that held this would keep it and the weights for good: the collector does not see through it
        parameter.register_post_accumulate_grad_hook(lambda parameter: me()._gather(parameter))

    def _gather(self, parameter: nn.Parameter) -> None:
        """Takes what a backward pass left in the parameter, so that the next one's is not added to it in 16 bits."""
        new, parameter.grad = local(parameter.grad), None
        new = new.to_dense() if new.is_sparse else new  # of embeddings whose head no loss has used
        self.gradient = new if self.gradient is None else self.gradient.float().add_(new)

    def whole_gradient(self) -> Tensor:
        """The gradient in fp32, which stays the one that is used; zeros where no batch reached the tensor."""
        held = local(self.parameters[0])
        self.gradient = torch.zeros(held.shape, device=held.device) if self.gradient is None else self.gradient.float()
        return self.gradient

    def square(self) -> Tensor:
        """The gradient's squared norm, fp32."""
        if self.gradient is None:
            return torch.zeros((), device=local(self.parameters[0]).device)
        if kernels.fit(self.gradient):
            return kernels.square(self.gradient)
        parts = self.gradient.reshape(-1).split(_block(self.gradient))
        return torch.stack([torch.linalg.vector_norm(part, dtype=torch.float32) for part in parts]).square().sum()

    @property
    def masters(self) -> list[Tensor]:
        """The weights in fp32; of a bf16 tensor a copy."""
        held = local(self.parameters[0])
        if self.low is None:
            return [held if self.copy is None else self.copy]
        return [_join(held.reshape(-1), self.low.reshape(-1), self.place).view(held.shape)]

    def pieces(self, factor: float) -> Iterator[Piece]:
        """What the rule is to move, the gradient multiplied by a factor; whoever takes a piece and moves it, asks for the next one."""
        held = local(self.parameters[0])
        gradient = torch.zeros_like(held) if self.gradient is None else self.gradient
        if self.low is None:
            master = held if self.copy is None else self.copy
            for part, grad, *memory in _blocks(self.rule, master, gradient.contiguous(), *self.memory.values()):
                yield part, grad.float().mul_(factor), dict(zip(self.memory, memory, strict=True))
            held.copy_(master)
            return
        begin = self.place
        for upper, low, grad, *memory in _blocks(self.rule, held, self.low, gradient.contiguous(), *self.memory.values()):
            master = _join(upper.view(-1), low.view(-1), begin).view(upper.shape)
            yield master, grad.float().mul_(factor), dict(zip(self.memory, memory, strict=True))
            _divide(master.view(-1), upper.view(-1), low.view(-1), begin)
            begin += upper.numel()

    def move(self, factor: float, moment: Moment) -> None:
        """One update, the gradient multiplied by a factor; by AdamW of bf16 weights on a CPU in one pass."""
        held, gradient = local(self.parameters[0]), self.gradient
        whole = gradient is not None and gradient.is_contiguous() and self.low is not None
        if whole and isinstance(self.rule, AdamW) and kernels.fit(held):
            self.rule.update_halves(held, self.low, gradient, self.memory, factor, moment, place=self.place)
        else:
            _move(self, factor, moment)

    def follow(self) -> None:
        """Gives a weight that has its master beside it that master's value."""
        if self.copy is not None:
            local(self.parameters[0]).copy_(self.copy)

    def sample(self, stride: int) -> Tensor:
        """Every so-manieth weight."""
        if self.low is None:
            return self.masters[0].flatten()[::stride].clone()
        held = local(self.parameters[0]).reshape(-1)
        return _join(held[::stride], self.low.reshape(-1)[::stride], self.place, stride)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors that give the weights, as they are to be kept."""
        (name,) = self.names
        yield f"weight.{name}", local(self.parameters[0]) if self.copy is None else self.copy
        if self.low is not None:
            yield f"low.{name}", self.low

    def remembered(self) -> Iterator[tuple[str, Tensor]]:
        """What the rule remembers."""
        for kind, held in self.memory.items():
            yield f"{kind}.{self.names[0]}", held


def _blocks(rule: Rule, held: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """A tensor, and others with a number for each of its own or for each group of them, in the blocks that the rule moves at once."""
    if rule.group is None:
        return iter([(held, *others)])
    block, N = _block(held), held.numel()
    return zip(*(t.view(-1).split(block if t.numel() == N else block // rule.group) for t in (held, *others)), strict=True)


def _move(unit: Run | Apart, factor: float, moment: Moment) -> None:
    for master, gradient, memory in unit.pieces(factor):
        if master.numel():  # a shard may be empty
            unit.rule.update(master, gradient, memory, moment)


def _place(parameter: Tensor) -> int:
    """The place in the whole tensor of the first number that lies in this process."""
    if not isinstance(parameter, DTensor):
        return 0
    _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return offset[0] * math.prod(parameter.shape[1:])


def _thresholds(place: int, count: int, device: torch.device, stride: int = 1) -> Tensor:
    """[count] in int32, at every so-manieth place from `place` on: what is added to a master's bits before its lower half is cut off."""
    start, each = (number % (1 << 32) for number in (place * GOLDEN, stride * GOLDEN))
    start, each = (number - (number >> 31 << 32) for number in (start, each))  # the same bits, as int32 has them
    places = torch.arange(count, dtype=torch.int32, device=device)
    return places.mul_(each).add_(start).bitwise_right_shift_(16).bitwise_and_(LOW)


def _join(upper_N: Tensor, low_N: Tensor, place: int, stride: int = 1) -> Tensor:
    """[N] in fp32: the masters of bf16 weights, whose lower halves are int16; every so-manieth from `place` on. A block at a time."""
    master_N = torch.empty(upper_N.shape, dtype=torch.float32, device=upper_N.device)
    block = _block(upper_N)
    for number, (master, upper, low) in enumerate(zip(*(t.split(block) for t in (master_N, upper_N, low_N)), strict=True)):
        lower = low.to(torch.int32).bitwise_and_(LOW)
        carried = _thresholds(place + number * block * stride, len(lower), lower.device, stride).add_(lower).bitwise_right_shift_(16)
        bits = master.view(torch.int32).copy_(upper.view(torch.int16))
        bits.sub_(carried).bitwise_left_shift_(16).bitwise_or_(lower)
    return master_N


def _divide(master_N: Tensor, upper_N: Tensor, low_N: Tensor, place: int) -> None:
    """What `_join` puts together, taken apart again after the masters, which are overwritten, have moved."""
    block = _block(upper_N)
    for number, (master, upper, low) in enumerate(zip(*(t.split(block) for t in (master_N, upper_N, low_N)), strict=True)):
        bits = master.view(torch.int32)
        low.copy_(bits)
        thresholds = _thresholds(place + number * block, len(bits), bits.device)
        upper.view(torch.int16).copy_(bits.clamp_(max=NAN).add_(thresholds).bitwise_right_shift_(16))
