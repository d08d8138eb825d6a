"""The strict base of every recipe section, the marker of settings that hold a path, and what a setting's type holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict


class PathMarker:
    """Marks a setting that holds a path: it starts at the recipe's folder, or on the command line at the current one."""


PathText = Annotated[str, PathMarker()]


class Section(BaseModel):
    """A part of the recipe: unknown keys, wrong types and numbers that are not finite are refused, values do not change afterwards."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )


def sections_of(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections that a setting of this type can hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from sections_of(argument)


def type_names(annotation: Any) -> list[str]:
    """The `type` of each section that a setting can hold: its bare names."""
    return [section.model_fields["type"].default for section in sections_of(annotation)]
