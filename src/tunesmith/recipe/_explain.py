"""From pydantic's list of problems to one sentence: the key, where it stands, and the mend, with the nearest key for an unknown one."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator
from typing import Any, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ..errors import RecipeError
from ._base import sections_of
from ._recipe import Recipe
from .method import IS_TYPE_WITH
from .task import METRICS_KNOWN_AS

KeyPath = tuple[str | int, ...]
Places = dict[KeyPath, str]  # where a key was written: FILE:LINE or --set KEY
OF_MAPPINGS = ("model_type", "model_attributes_type", "dict_type")  # pydantic's names of the problem that something is no mapping
_SHOWN = 80  # characters of a refused value
_OWN = re.compile(r"Value error, ([a-z_]\w*(?:\.\w+)*)((?:, [\w.]+)*: .+)", re.DOTALL)  # how a check of ours names its key, or several


def explain(error: ValidationError, values: dict[str, Any], places: Places, where: str) -> RecipeError:
    """The first problem, an unknown key before all others, since it is often why another one is missing."""
    order = list(places)
    problems = [(item, _real_path(item, values)) for item in error.errors()]
    item, path = min(problems, key=lambda pair: (pair[0]["type"] != "extra_forbidden", _position(pair[1], places, order)))
    name, place = dotted(path), place_of(path, places, where)
    if own := _OWN.fullmatch(item["msg"]):
        path = (*path, *(int(part) if part.isdigit() else part for part in own[1].split(".")))
        return RecipeError(f"{dotted(path)}{own[2]}", where=place_of(path, places, where), mend=_describe(path, values))
    if item["type"] == "extra_forbidden":
        known = list(_fields_at(path[:-1], values))
        near = _keys_below(path[:-1], str(path[-1]), values) or difflib.get_close_matches(str(path[-1]), known, n=1, cutoff=0.5)
        mend = f"did you mean `{near[0]}`?" if near else f"known keys here: {', '.join(known)}"
        return RecipeError(f"unknown key `{name}`", where=place, mend=mend)
    if item["type"] == "missing":
        return RecipeError(f"`{name}` is not given", where=place, mend=f"add `{path[-1]}`")
    if item["type"] in ("union_tag_invalid", "union_tag_not_found"):
        return _wrong_type_name(item, name, place)
    got = f" (got {json.dumps(item['input'], default=str)[:_SHOWN]})" if not isinstance(item["input"], dict) else ""
    named = [other["ctx"]["expected"] for other, at in problems if at == path and other["type"] == "literal_error"]
    also = "" if item["type"] == "literal_error" else "".join(f", or {names}" for names in named)
    what = f"{_words(item)}{also}{got}"
    mend, near = _describe(path, values), []
    if named:
        choices = re.findall(r"'([^']*)'", named[0])
        given = str(item["input"])
        near = _known_as(given, choices) or _begun(given, choices) or difflib.get_close_matches(given, choices, n=1, cutoff=0.5)
        mend = f"did you mean `{near[0]}`? {mend}" if near else mend
    if item["type"] == "list_type" and type(item["input"]) in (str, int, float) and not _sections_at(path, values) and not near:
        mend = f"write [{str(item['input'])[:_SHOWN]}]; {mend}"
    if item["type"] in OF_MAPPINGS and isinstance(item["input"], str) and any(map(_needs_a_name_alone, _sections_at(path, values))):
        mend = f"write {{name: {item['input']}}}; {mend}"
    if item["type"].startswith(("greater_than", "less_than")) and "; derived " in mend:
        mend = f"leave it out to have it derived; {mend}"
    if path:
        what = f"`{name}` {what}" if what.startswith("must ") else f"`{name}`: {what}"
    return RecipeError(what, where=place, mend=mend)


def _needs_a_name_alone(section: type[BaseModel]) -> bool:
    """Whether a name is all that must be given."""
    return [name for name, field in section.model_fields.items() if field.is_required()] == ["name"]


def _known_as(given: str, choices: list[str]) -> list[str]:
    """The name that a thing has here, where it is better known by another."""
    return [name for name in [METRICS_KNOWN_AS.get(given.lower(), "")] if name in choices]


def _begun(given: str, choices: list[str]) -> list[str]:
    """The first of the names that the given one is the beginning of: the plainest comes first in a list of choices."""
    return [name for name in choices if len(given) > 2 and name.startswith(given)][:1]


def _words(item: ErrorDetails) -> str:
    """A problem in words of ours: what the value must be, and not what pydantic calls its types."""
    if item["type"] in OF_MAPPINGS:
        return "must be a valid dictionary, with settings written as `key: value`"
    if item["type"] == "bool_type":
        return "must be true or false"
    if item["type"] == "too_short":
        return f"must hold at least {item['ctx']['min_length']} entries" if item["ctx"]["min_length"] > 1 else "must not be empty"
    message = item["msg"].removeprefix("Value error, ")
    message = re.sub(r"^(Input|String|List|Dictionary|Value) should ", "must ", message)
    return f"{message[0].lower()}{message[1:]}"


def dotted(path: KeyPath) -> str:
    """A path as `--set` takes it."""
    return ".".join(map(str, path))


def place_of(path: KeyPath, places: Places, where: str) -> str:
    """Where a key, or else the nearest thing around it, was written."""
    return next((places[path[:n]] for n in range(len(path), 0, -1) if path[:n] in places), where)


def _position(path: KeyPath, places: Places, order: list[KeyPath]) -> int:
    return next((order.index(path[:n]) for n in range(len(path), 0, -1) if path[:n] in places), -1)


def _wrong_type_name(item: ErrorDetails, name: str, place: str) -> RecipeError:
    known = [word.strip().strip("'") for word in item.get("ctx", {}).get("expected_tags", "").split(",") if word.strip()]
    if not known:
        return RecipeError(f"`{name}.type` is not given", where=place, mend="add `type`, such as {type: lora, r: 16}")
    given = str(item["ctx"]["tag"])
    near = difflib.get_close_matches(given, known, n=1, cutoff=0.5)
    mend = f"did you mean `{near[0]}`?" if near else f"one of: {', '.join(known)}"
    mend = f"write {IS_TYPE_WITH[given]}" if given in IS_TYPE_WITH else mend
    return RecipeError(f"`{name}`: unknown type `{given[:_SHOWN]}`", where=place, mend=mend)


def _real_path(item: ErrorDetails, values: Any) -> KeyPath:
    """A problem's location without the tags that pydantic puts in for the members of a union."""
    path: list[str | int] = []
    probe: Any = values
    for index, part in enumerate(item["loc"]):
        last = index == len(item["loc"]) - 1
        if _has(probe, part):
            probe = probe[part]
        elif not (last and item["type"] == "missing"):
            continue
        path.append(part)
    return tuple(path)


def _has(values: Any, part: str | int) -> bool:
    return part in values if isinstance(values, dict) else isinstance(values, list) and isinstance(part, int) and part < len(values)


def _sections_at(path: KeyPath, values: Any) -> list[type[BaseModel]]:
    current: list[type[BaseModel]] = [Recipe]
    for part in path:
        values = values[part] if _has(values, part) else None
        if isinstance(part, int):
            continue
        current = [s for section in current if part in section.model_fields for s in sections_of(section.model_fields[part].annotation)]
        kind = values.get("type") if isinstance(values, dict) else None
        exact = [s for s in current if "type" in s.model_fields and s.model_fields["type"].default == kind]
        current = exact or current
    return current


def _fields_at(path: KeyPath, values: Any) -> Iterator[str]:
    for section in _sections_at(path, values):
        yield from section.model_fields


def _keys_below(path: KeyPath, name: str, values: Any) -> list[str]:
    """Where a key of this name stands in a part of the sections at a path: the first, the shallowest before others."""
    level = [(path, section) for section in _sections_at(path, values)]
    while level:
        found = [dotted((*above, name)) for above, section in level if name in section.model_fields]
        if found:
            return found[:1]
        level = [
            ((*above, part, 0) if get_origin(field.annotation) is list else (*above, part), inner)
            for above, section in level
            for part, field in section.model_fields.items()
            for inner in sections_of(field.annotation)
        ]
    return []


def _describe(path: KeyPath, values: Any) -> str:
    keys = [index for index, part in enumerate(path) if isinstance(part, str)]
    for section in _sections_at(path[: keys[-1]], values) if keys else []:
        if path[keys[-1]] in section.model_fields:
            means = section.model_fields[str(path[keys[-1]])].description or ""
            return f"{path[keys[-1]]} means: {' '.join(means.split())}"
    return "see `tunesmith schema` for every setting"
