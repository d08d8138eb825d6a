"""The base model: where its weights come from and how they are held."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ._base import PathText, Section


class RopeScaling(Section):
    """How the rotary positions of a model are stretched, so that it reads rows of `factor` times its context."""

    rope_type: Literal["linear", "yarn"]
    """linear divides every position by the factor; yarn, the slow frequencies alone, which needs less training."""
    factor: Annotated[float, Field(gt=1)]
    """The new context over the old one."""

    @field_validator("rope_type", mode="before")
    @classmethod
    def _of_no_batch(cls, value: Any) -> Any:
        if value in ("dynamic", "longrope"):
            raise ValueError(f"{value} scales by the longest row of a batch, so a row would depend on its company; write linear or yarn")
        return value


class ModelSection(Section):
    """Which pretrained model is tuned."""

    name: PathText
    """An embedded model (smollm2-135m-instruct), a folder, a .gguf file, or a hub name (owner/name)."""
    revision: str | None = None
    """A hub revision; a 40-digit commit pins the model, anything else is resolved to one and recorded."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """How the base is held and computed: auto takes bfloat16 where the processor has it, else float32. In float16 the loss is scaled."""
    quantization: Literal["nf4", "int8"] | None = None
    """What the base's linear layers are held in, by bitsandbytes: nf4 (a quarter of bfloat16's memory) or int8 (half)."""
    rope_scaling: RopeScaling | None = None
    """Longer rows than the model was made for: {rope_type: yarn, factor: 2.0}. An adapter's base must have it wherever it is used."""
    chat_template: PathText | None = None
    """For a base model without a chat template: a named one (chatml) or a .jinja file; its new tokens are trained and saved."""
    trust_remote_code: bool = False
    """Whether Python code that lies in the model's folder may run."""

    @model_validator(mode="after")
    def _only_the_hub_has_revisions(self) -> ModelSection:
        on_hub = self.name.count("/") == 1 and not self.name.startswith((".", "/", "~")) and not self.name.endswith(".gguf")
        if self.revision is not None and not on_hub:
            raise ValueError(f"model.revision names a commit on the hub, and {self.name} is not from there: take it out")
        return self
