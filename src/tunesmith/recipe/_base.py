"""The strict base of every recipe section, and the marker of settings that hold a path."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict


class PathMarker:
    """Marks a setting that holds a path: it starts at the recipe's folder, or on the command line at the current one."""


PathText = Annotated[str, PathMarker()]


class Section(BaseModel):
    """A part of the recipe: unknown keys and wrong types are refused, values do not change afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, protected_namespaces=())
