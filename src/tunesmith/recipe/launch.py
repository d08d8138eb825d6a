"""On how many processes and machines a recipe is trained, and how the model lies on them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ._base import Section

Strategy = Literal["ddp", "fsdp", "zero2", "zero3"]
ZERO = {"zero2": 2, "zero3": 3}
"""The strategies that are DeepSpeed's, and ZeRO's stage of each."""
Positive = Annotated[int, Field(ge=1)]


class LaunchSection(Section):
    """Several processes, under torchrun. One process by default."""

    nproc_per_node: Positive | None = None
    """Processes on each machine, one a GPU; `run` and `train` then start torchrun themselves, unless they run under it."""
    nodes: Positive = 1
    """Machines; of more than one, `tunesmith launch` prints the file that starts them."""
    accelerator: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")] | None = None
    """The kind of GPU to ask a cluster for (H100), as its tool calls it; SkyPilot has to be told one."""
    hours: Positive | None = None
    """How long a cluster may take."""
    strategy: Strategy = "ddp"
    """How the model lies on the processes: whole on each (ddp), the base sharded over them with gradients and optimiser (fsdp), or by
    DeepSpeed's ZeRO, gradients and optimiser shared out (zero2), or the weights too (zero3)."""
    processes: Positive | None = None
    """Processes whose batches make an update; derived as the number that the run begins with, and kept when it goes on with another."""
