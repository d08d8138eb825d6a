"""On how many processes and machines a recipe is trained, and how the model lies on them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from ._base import Section

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
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """How the model lies on the processes: whole on each (ddp), or the base sharded over them, with gradients and optimiser (fsdp)."""
    processes: Positive | None = None
    """Processes whose batches make an update; derived as the number that the run begins with, and kept when it goes on with another."""

    @field_validator("strategy", mode="before")
    @classmethod
    def _no_deepspeed(cls, value: Any) -> Any:
        if value in ("zero1", "zero2", "zero3", "deepspeed"):
            raise ValueError(f"{value} of DeepSpeed is not supported; fsdp shards weights, gradients and optimiser as ZeRO-3 does")
        return value
