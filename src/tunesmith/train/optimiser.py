"""The optimiser of one stage: it holds gradients and fp32 masters, takes the norm, clips, and lets the recipe's update rule move them.

What is kept where is `masters.py`; how a tensor moves is `updates/`. Weight decay applies to matrices only, which IA3's scales are not:
PEFT holds those vectors as one row or one column, and decay would draw them to 0, away from the 1 at which the base is as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..errors import CheckpointError, RecipeError
from ..recipe import Stage
from .loss_scale import LossScale
from .masters import Apart, Run
from .updates import Choice, Moment

SCALES = ".ia3_l."  # PEFT's name of IA3's vectors
SAMPLE = 200_000  # weights remembered from the start, to say which share has moved
Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over the processes that hold the shards."""


def _alone(tensor: Tensor) -> Tensor:
    """The sum over processes where there is one."""
    return tensor


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies to a tensor."""
    return parameter.dim() >= 2 and SCALES not in name


class Optimiser:
    """Gradients, masters and what the rule remembers, of every parameter that trains.

    parameters: by name; of DTensors, this process's shards are moved, and their gradients are taken to be reduced already. scales: how many
    times the stage's learning rate a parameter moves at, by name. tables: names of embeddings and heads, which Muon leaves to AdamW.
    loss_scale: what gradients are multiplied by when they come.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        stage: Stage,
        *,
        scales: Mapping[str, float] | None = None,
        tables: Collection[str] = (),
        loss_scale: LossScale | None = None,
    ):
        self.loss_scale = loss_scale
        self.weight_decay, self.max_grad_norm = stage.weight_decay, stage.max_grad_norm
        self.updates = torch.zeros(())  # made so far
        self._learned = False
        choice, scales = Choice(stage), scales or {}
        named = [(name, parameter) for name, parameter in parameters if parameter.requires_grad]
        rules = {name: choice.rule(p.shape, table=name in tables or SCALES in name) for name, p in named}
        for name, parameter in named:
            if isinstance(parameter, DTensor) and stage.optim in ("adafactor", "muon"):
                raise RecipeError(
                    f"{stage.optim} moves whole matrices, and `{name}` is sharded over processes",
                    where=f"stages.{stage.name}.optim",
                    mend="adamw_torch_fused or adamw_8bit, or train without sharding",
                )

        def group(pair: tuple[str, nn.Parameter]) -> tuple[bool, bool, float, bool, str]:
            """What lies side by side: the flat buffer's tensors first, those that one call may move together."""
            name, p = pair
            flat, joins = p.dtype == torch.float32 and not isinstance(p, DTensor), rules[name].group == 1
            return not flat, not decays(name, p), scales.get(name, 1.0), joins, "" if flat and joins else name

        named.sort(key=group)
        self.names, self.parameters = [name for name, _ in named], [parameter for _, parameter in named]
        sizes = [p.numel() for pair, p in zip(named, self.parameters, strict=True) if not group(pair)[0]]
        self.flat, self.flat_gradient = (torch.zeros(sum(sizes), dtype=torch.float32, device=self.parameters[0].device) for _ in range(2))
        self._units: list[tuple[Run | Apart, bool, float]] = []
        begin = 0
        for (apart, is_vector, scale, *_), members in groupby(named, key=group):
            held = list(members)
            rule = rules[held[0][0]]
            if apart:
                self._units.append((Apart(*held[0], rule), not is_vector, scale))
                continue
            end = begin + sum(p.numel() for _, p in held)
            self._units.append((Run(held, self.flat[begin:end], self.flat_gradient[begin:end], rule), not is_vector, scale))
            begin = end
        self._apart = [unit for unit, *_ in self._units if isinstance(unit, Apart)]
        self._stride = max(1, sum(p.numel() for p in self.parameters) // SAMPLE)
        self._start = self._sample()

    @property
    def sharded(self) -> set[str]:
        """Names of tensors of which each process holds a part."""
        return {name for name, held in zip(self.names, self.parameters, strict=True) if isinstance(held, DTensor)}

    @property
    def masters(self) -> list[Tensor]:
        """Every trained tensor in fp32, in the order of `names`; of a bf16 tensor a copy, of a sharded one this process's part."""
        return [master for unit, *_ in self._units for master in unit.masters]

    def zero_grad(self) -> None:
        """Sets every gradient to 0."""
        self._learned = False
        self.flat_gradient.zero_()
        for unit in self._apart:
            unit.gradient = None

    def gradients(self) -> list[Tensor]:
        """Every gradient that each process holds whole, fp32, the same list on all of them: to be summed over processes in place."""
        flat = [self.flat_gradient] if len(self.flat_gradient) else []
        return flat + [unit.whole_gradient() for unit in self._apart if not unit.sharded]

    @property
    def scale(self) -> float:
        """What the loss is to be multiplied by before its backward pass."""
        return 1.0 if self.loss_scale is None else self.loss_scale.value

    def backward(self, loss: Tensor) -> None:
        """Adds a loss's gradients, times the loss scale, to what there is."""
        self._learned = True
        loss.mul(self.scale).backward()

    def update(self, learning_rate: float, reduce: Reduce = _alone) -> float:
        """One update, and the norm of its gradients before they were clipped; where that is not finite, or no loss had gradients, nothing
        moves. reduce: sums over the processes that hold the shards."""
        if not self._learned:
            return 0.0
        norm = self.grad_norm(reduce)
        if math.isfinite(norm):
            self.step(learning_rate, norm)
        return norm

    def grad_norm(self, reduce: Reduce = _alone) -> float:
        """The Euclidean norm of all gradients, the loss scale taken out. reduce: sums the squares of shards over the processes."""
        whole = torch.linalg.vector_norm(self.flat_gradient).square()
        shards = torch.zeros_like(whole)
        for unit in self._apart:
            (shards if unit.sharded else whole).add_(unit.square())
        return math.sqrt(float(whole) + float(reduce(shards))) / self.scale

    def step(self, learning_rate: float, norm: float) -> None:
        """One update; gradients, which are overwritten, are scaled down to max_grad_norm if `norm` is above it."""
        factor = 1.0 / self.scale
        if self.max_grad_norm is not None and norm > self.max_grad_norm:
            factor *= self.max_grad_norm / (norm + 1e-6)
        self.updates += 1
        for unit, decays, scale in self._units:
            moment = Moment(int(self.updates), learning_rate * scale, self.weight_decay if decays else 0.0)
            unit.move(factor, moment)

    def without_gradient(self, reduce: Reduce = _alone) -> list[str]:
        """Names of tensors whose gradient is exactly 0 everywhere. reduce: sums over processes which shards have one, [names]."""
        none = torch.zeros((), device=self.flat.device)
        held = [part for unit, *_ in self._units for part in _gradients_of(unit)]
        has = reduce(torch.stack([none if part is None else part.any().float() for part in held]))
        return [name for name, one in zip(self.names, has.tolist(), strict=True) if not one]

    def fraction_changed(self) -> float:
        """The share of (sampled) weights that differ from where the stage began; of shards, this process's."""
        return float((self._sample() != self._start).float().mean())

    def _sample(self) -> Tensor:
        return torch.cat([unit.sample(self._stride) for unit, *_ in self._units])

    def state(self) -> dict[str, Tensor]:
        """Everything an update depends on, by parameter: weights (bf16 ones in two halves), what the rule remembers, the update count."""
        remembered = {key: held for unit, *_ in self._units for key, held in unit.remembered()}
        scale = dict(self.loss_scale.state()) if self.loss_scale is not None else {}
        return {"updates": self.updates} | scale | dict(self._weights()) | remembered

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        for unit, *_ in self._units:
            yield from unit.weights()

    def parts(self) -> dict[str, int]:
        """How many rows this process takes from a checkpoint, of the tensors of which it takes a part."""
        return {key: len(held) for key, held in self.state().items() if key.partition(".")[2] in self.sharded}

    def load_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts a saved state's weights in place, and nothing else."""
        for name, held in self._weights():
            held.copy_(tensors[name])
        for unit in self._apart:
            unit.follow()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts a saved state in place, bit for bit. Raises CheckpointError if names or shapes differ."""
        mine = self.state()
        odd = sorted({(k, tuple(t.shape)) for k, t in mine.items()} ^ {(k, tuple(t.shape)) for k, t in tensors.items()})
        if odd:
            raise CheckpointError(
                f"the checkpoint's weights are not this stage's: {odd[0][0]}",
                mend="resume with the recipe and the version of tunesmith that the run began with",
            )
        for name, held in mine.items():
            held.copy_(tensors[name])
        self.load_weights(tensors)

    def close(self) -> None:
        """Nothing to give back."""


def _gradients_of(unit: Run | Apart) -> list[Tensor | None]:
    return [p.grad for p in unit.parameters] if isinstance(unit, Run) else [unit.gradient]
