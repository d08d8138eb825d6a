"""Several processes at one training: who this one is, what all of them agree on, and whose batch is whose. Alone, all of it is nothing.

torchrun's environment says how many there are. Numbers that are told between them are plain JSON, added up in the order of the ranks, so
that every process has the same sum. Control goes over gloo, gradients over NCCL where there are GPUs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import chain
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..errors import PeerLost
from ..models import kernels
from ..rundir import rank, world

T = TypeVar("T")
PATIENCE = timedelta(hours=24)  # the others wait while the first prepares the data; one that ends is noticed at once


@contextmanager
def process_group() -> Iterator[None]:
    """Joins the group that torchrun's environment names, for as long as the context lasts. What torch says in it of a process that is gone
    is raised as PeerLost."""
    if world() == 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    try:
        yield
    except RuntimeError as error:  # of any collective, also of torch's own: gradients, shards
        if not isinstance(error, dist.DistError) and not any(words in str(error).lower() for words in ("gloo", "by peer")):
            raise
        where = f"rank {rank()} of {world()}"
        raise PeerLost("another process of this run ended", where=where, mend="see its own error; then go on with --resume") from error
    finally:
        dist.destroy_process_group()


def gather(value: Any) -> list[Any]:
    """Every process's value, which is plain JSON, in the order of the ranks."""
    if world() == 1:
        return [value]
    told = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world())]
    dist.all_gather(sizes, torch.tensor([len(told)]))
    longest = int(max(sizes))
    held = [torch.empty(longest, dtype=torch.uint8) for _ in range(world())]
    dist.all_gather(held, torch.cat([told, told.new_zeros(longest - len(told))]))
    return [json.loads(bytes(part[: int(size)].tolist())) for part, size in zip(held, sizes, strict=True)]


def of_first(make: Callable[[], Any]) -> Any:
    """What the first process makes, which is plain JSON, on every process; the others wait for it."""
    return gather(make() if rank() == 0 else None)[0]


def wait() -> None:
    """Waits until every process is here."""
    gather(None)


@contextmanager
def first_goes_ahead() -> Iterator[None]:
    """The first process does the block, then the others do it, who find what it wrote."""
    if rank() > 0:
        wait()
    yield
    if rank() == 0:
        wait()
    wait()


def summed(values: Mapping[str, float]) -> dict[str, float]:
    """The sums over all processes, by name; one that a process lacks counts 0 there."""
    total: dict[str, float] = {}
    for part in gather(dict(values)):
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + value
    return total


def sum_in_place(tensors: Iterable[torch.Tensor]) -> None:
    """Adds up tensors that every process holds of the same shapes."""
    if world() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def added(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's sum over all processes, in its place."""
    sum_in_place([tensor])
    return tensor


def mine(parts: Sequence[T]) -> Sequence[T]:
    """This process's share, which is next to one another, of parts that are computed apart."""
    count = len(parts)
    return parts[count * rank() // world() : count * (rank() + 1) // world()]


def together(own: list[T]) -> list[T]:
    """What the processes made of the shares that `mine` gave them, in the parts' order, on all of them."""
    return list(chain.from_iterable(gather(own)))


def in_order(own: list[T]) -> list[T]:
    """What the processes made of parts that were dealt out as `data.batching.deal` does it, in the parts' order, on all of them."""
    found = gather(own)
    return [part[k] for k in range(max(map(len, found))) for part in found if k < len(part)]


def same_loops_everywhere() -> None:
    """Has every process compute without compiled loops where one cannot have them: replicas would differ in their last bits."""
    if world() > 1 and (missing := [reason for reason in gather(kernels.unavailable()) if reason]):
        kernels.leave_out(missing[0])
