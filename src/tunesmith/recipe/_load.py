"""From a recipe file and `--set key=value` words to a checked Recipe, and back to YAML or a JSON Schema."""

from __future__ import annotations

import difflib
import json
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from ..errors import MissingFile, RecipeError
from ._base import PathMarker
from ._recipe import Recipe
from ._yaml import Lines, parse_yaml

Path_ = tuple[str | int, ...]


def load_recipe(source: str | Path | dict[str, Any] | Recipe, sets: Sequence[str] = (), *, out: str | Path | None = None) -> Recipe:
    """A checked recipe from a YAML file, a dict or a Recipe, with `key=value` overrides.

    Paths in the file start at its folder; paths in `sets`, `out` and a dict start at the current folder. Every path
    of the result that names something that exists is absolute. Raises RecipeError or MissingFile.
    """
    if isinstance(source, Recipe):
        values, lines, where, folder = source.model_dump(exclude_unset=True), {}, "recipe", Path.cwd()
    elif isinstance(source, dict):
        values, lines, where, folder = source, {}, "recipe", Path.cwd()
    else:
        path = Path(source)
        values, lines = parse_yaml(_read(path), str(path))
        where, folder = str(path), path.resolve().parent
    if not isinstance(values, dict):
        raise RecipeError("a recipe is a mapping of sections", where=where, mend="begin with `name:`, `model:`, `data:` and `stages:`")
    values = json.loads(json.dumps(values, default=str))
    _absolute(values, folder)
    for word in sets:
        _override(values, word)
    if out is not None:
        values.setdefault("output", {})["dir"] = str(Path(out).absolute())
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise _explain(error, values, lines, where) from None


def dump_recipe(recipe: Recipe) -> str:
    """The whole recipe as YAML, every setting written out; loading it gives an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(), sort_keys=False, allow_unicode=True, width=140)


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"not UTF-8 text (byte {error.start})", where=str(path), mend="save the recipe as UTF-8") from error
    except OSError as error:
        raise MissingFile(f"cannot read the recipe: {error.strerror}", where=str(path), mend="check the path; `tunesmith init FILE` writes a recipe") from error


def _absolute(values: dict[str, Any], folder: Path) -> None:
    """Makes relative paths absolute in place, where the setting holds a path and the thing looks like one."""
    for holder, key in _path_settings(Recipe, values):
        text = holder[key]
        if isinstance(text, str) and not Path(text).is_absolute() and ((folder / text).exists() or _looks_like_a_path(text)):
            holder[key] = str((folder / text).resolve() if not (folder / text).is_symlink() else (folder / text).absolute())


def _looks_like_a_path(text: str) -> bool:
    return text.startswith((".", "~")) or text.count("/") > 1 or Path(text).suffix in _SUFFIXES


_SUFFIXES = {".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".gguf", ".jinja", ".yaml", ".safetensors"}


def _path_settings(section: type[BaseModel], values: Any) -> Iterator[tuple[dict[str, Any], str]]:
    if not isinstance(values, dict):
        return
    for name, field in section.model_fields.items():
        if name not in values:
            continue
        if any(isinstance(m, PathMarker) for m in field.metadata) or _holds_path(field.annotation):
            yield values, name
        for inner in _sections(field.annotation):
            for value in values[name] if isinstance(values[name], list) else [values[name]]:
                yield from _path_settings(inner, value)


def _holds_path(annotation: Any) -> bool:
    if get_origin(annotation) is Annotated:
        return any(isinstance(m, PathMarker) for m in annotation.__metadata__)
    return get_origin(annotation) in (Union, types.UnionType) and any(_holds_path(a) for a in get_args(annotation))


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections(argument)


def _override(values: dict[str, Any], word: str) -> None:
    """Applies one `a.b.0.c=value`; the value is YAML."""
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise RecipeError("not of the form key=value", where=f"--set {word}", mend="write --set stages.0.learning_rate=1e-4")
    value, _ = parse_yaml(text, f"--set {key}") if text else ("", {})
    parts: list[str | int] = [int(part) if part.isdigit() else part for part in key.split(".")]
    holder: Any = values
    for index, part in enumerate(parts):
        last = index == len(parts) - 1
        place = f"--set {key}"
        if isinstance(part, int):
            if not isinstance(holder, list) or part >= len(holder):
                size = f"has {len(holder)} entries, counted from 0" if isinstance(holder, list) else "is not a list"
                raise RecipeError(f"`{'.'.join(map(str, parts[:index]))}` {size}", where=place, mend="use an index that is there")
        elif not isinstance(holder, dict):
            raise RecipeError(f"`{'.'.join(map(str, parts[:index]))}` has no keys", where=place, mend="use a key of the recipe")
        if last:
            holder[part] = value
        else:
            if isinstance(holder, dict) and not isinstance(holder.get(part), dict | list):
                bare = holder.get(part)
                holder[part] = {"type": bare} if isinstance(bare, str) else {}
            holder = holder[part]
    _absolute_one(values, parts)


def _absolute_one(values: dict[str, Any], parts: list[str | int]) -> None:
    probe: Any = values
    for part in parts[:-1]:
        probe = probe[part]
    for holder, key in _path_settings(Recipe, values):
        if holder is probe and key == parts[-1] and isinstance(holder[key], str):
            text = holder[key]
            if Path(text).exists() or _looks_like_a_path(text):
                holder[key] = str(Path(text).expanduser().absolute())


def _explain(error: ValidationError, values: dict[str, Any], lines: Lines, where: str) -> RecipeError:
    """The first problem, by line, as one sentence with the mend."""
    problems = [(_line(_real_path(item["loc"], values), lines), item) for item in error.errors()]
    line, item = min(problems, key=lambda pair: pair[0] or 0)
    path = _real_path(item["loc"], values)
    dotted = ".".join(map(str, path))
    place = f"{where}:{line}" if line else where
    if item["type"] == "extra_forbidden":
        known = list(_fields_at(path[:-1], values))
        near = difflib.get_close_matches(str(path[-1]), known, n=1, cutoff=0.5)
        mend = f"did you mean `{near[0]}`?" if near else f"known keys here: {', '.join(known)}"
        return RecipeError(f"unknown key `{dotted}`", where=place, mend=mend)
    if item["type"] == "missing":
        return RecipeError(f"`{dotted}` is not given", where=place, mend=f"add `{path[-1]}`")
    message = item["msg"].removeprefix("Value error, ")
    got = f" (got {json.dumps(item['input'], default=str)[:80]})" if not isinstance(item["input"], dict) else ""
    return RecipeError(f"`{dotted}`: {message[0].lower()}{message[1:]}{got}", where=place, mend=_describe(path, values))


def _real_path(loc: Path_, values: Any) -> Path_:
    """A location without the tags that pydantic puts in for the members of a union."""
    path: list[str | int] = []
    probe = values
    for index, part in enumerate(loc):
        last = index == len(loc) - 1
        if isinstance(probe, dict) and part in probe:
            probe = probe[part]
        elif isinstance(probe, list) and isinstance(part, int) and part < len(probe):
            probe = probe[part]
        elif not (last and isinstance(probe, dict)):
            continue
        path.append(part)
    return tuple(path)


def _line(path: Path_, lines: Lines) -> int | None:
    while path and path not in lines:
        path = path[:-1]
    return lines.get(path)


def _section_at(path: Path_, values: Any) -> list[type[BaseModel]]:
    current: list[type[BaseModel]] = [Recipe]
    for part in path:
        values = values[part] if isinstance(values, dict | list) else None
        if isinstance(part, int):
            continue
        current = [s for section in current if part in section.model_fields for s in _sections(section.model_fields[part].annotation)]
        kind = values.get("type") if isinstance(values, dict) else None
        exact = [s for s in current if "type" in s.model_fields and s.model_fields["type"].default == kind]
        current = exact or current
    return current


def _fields_at(path: Path_, values: Any) -> Iterator[str]:
    for section in _section_at(path, values):
        yield from section.model_fields


def _describe(path: Path_, values: Any) -> str:
    names = [part for part in path if isinstance(part, str)]
    for section in _section_at(path[:-1], values) if names else []:
        if path[-1] in section.model_fields:
            return f"{path[-1]} means: {section.model_fields[path[-1]].description}"
    return "see `tunesmith schema` for every setting"
