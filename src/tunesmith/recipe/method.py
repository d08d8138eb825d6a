"""Which parameters train. One settings class each; a new method adds its class to the union."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ._base import Section


class FullMethod(Section):
    """Every parameter trains; fp32 master weights."""

    type: Literal["full"] = "full"
    """The method's name."""


class LoraMethod(Section):
    """Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685); names as in PEFT's LoraConfig."""

    type: Literal["lora"] = "lora"
    """The method's name."""
    r: Annotated[int, Field(ge=1)] = 16
    """Rank of the update."""
    lora_alpha: Annotated[float, Field(gt=0)] | None = None
    """Scale numerator; derived as 2r."""
    lora_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Dropout on the adapter's input; above 0 the fused path is off."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) in place of alpha / r (arXiv:2312.03732)."""
    target_modules: list[str] | None = None
    """Names of the linear layers that get an adapter, each of which must match; derived as every linear layer of the backbone."""


Method = Annotated[FullMethod | LoraMethod, Field(discriminator="type")]
