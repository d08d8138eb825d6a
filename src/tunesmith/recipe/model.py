"""The base model: where its weights come from and how they are held."""

from __future__ import annotations

from typing import Literal

from ._base import PathText, Section


class ModelSection(Section):
    """Which pretrained model is tuned."""

    name: PathText
    """An embedded model (smollm2-135m-instruct), a folder, a .gguf file, or a hub name (owner/name)."""
    revision: str | None = None
    """A hub revision; a 40-digit commit pins the model, anything else is resolved to one and recorded."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """How the base is held and computed: auto takes bfloat16 where the processor has it, else float32."""
    chat_template: PathText | None = None
    """For a base model without a chat template: a named one (chatml) or a .jinja file; its new tokens are trained and saved."""
    trust_remote_code: bool = False
    """Whether Python code that lies in the model's folder may run."""
