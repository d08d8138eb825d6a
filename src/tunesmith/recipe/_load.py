"""From a recipe file and `--set key=value` words to a checked Recipe, and back to YAML or a JSON Schema."""

from __future__ import annotations

import json
import os
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from ..errors import MissingFile, RecipeError
from ..rundir import redact
from ._base import PathMarker, sections_of
from ._explain import KeyPath, Places, dotted, explain, place_of
from ._recipe import Recipe
from ._yaml import MAX_BYTES, dump_yaml, parse_yaml

NAMES_A_STAGE = {"start_from", "reward_model", "model", "reference"}
_SUFFIXES = {".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".gguf", ".jinja", ".yaml", ".safetensors", ".py"}


def load_recipe(source: str | Path | dict[str, Any] | Recipe, sets: Sequence[str] = (), *, out: str | Path | None = None) -> Recipe:
    """A checked recipe from a YAML file, a dict or a Recipe, with `key=value` overrides.

    Paths in the file start at its folder; paths in `sets`, `out` and a dict start at the current folder. Every path
    of the result that names something that exists is absolute. Raises RecipeError or MissingFile; a recipe that holds
    a secret is refused, since the run directory repeats the recipe.

    >>> stages = [{"name": "sft", "objective": "sft", "learning_rate": 1e-4}]
    >>> given = {"name": "mine", "model": {"name": "smollm2-135m-instruct"}, "data": {"train": "owner/rows"}, "stages": stages}
    >>> load_recipe(given, ["stages.0.learning_rate=2e-4"]).stages[0].learning_rate
    0.0002
    """
    values, places, where, folder = _values(source)
    if not isinstance(values, dict):
        raise RecipeError("a recipe is a mapping of sections", where=where, mend="begin with `name:`, `model:`, `data:` and `stages:`")
    _make_absolute(values, folder)
    for word in sets:
        _override(values, word, places)
    if out is not None and isinstance(values.setdefault("output", {}), dict):
        values["output"]["dir"] = str(Path(out).absolute())
    _refuse_secrets(values, redact(values), (), places, where)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise explain(error, values, places, where) from None


def dump_recipe(recipe: Recipe) -> str:
    """The whole recipe as YAML, every setting written out; loading it gives an equal recipe."""
    return dump_yaml(recipe.model_dump())


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def _values(source: str | Path | dict[str, Any] | Recipe) -> tuple[Any, Places, str, Path]:
    """(plain values that are no one else's, where each key stands, what to call the source, the folder its paths start at)."""
    if isinstance(source, str | Path):
        path = Path(source)
        values, lines = parse_yaml(_read(path), str(path))
        where, folder = str(path), path.resolve().parent
        places: Places = {key: f"{path}:{line}" for key, line in lines.items()}
    else:
        values = source.model_dump(exclude_unset=True) if isinstance(source, Recipe) else source
        where, folder, places = "recipe", Path.cwd(), {}
    try:
        return json.loads(json.dumps(values, default=str)), places, where, folder
    except (TypeError, ValueError) as error:
        raise RecipeError(
            f"not plain values: {error}", where=where, mend="mappings with text keys, lists, text and numbers only"
        ) from error


def _read(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return file.read(MAX_BYTES + 1).decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"not UTF-8 text (byte {error.start})", where=str(path), mend="save the recipe as UTF-8") from error
    except OSError as error:
        mend = "check the path; `tunesmith init FILE` writes a recipe"
        if (path / "recipe.yaml").is_file():
            mend = f"give the recipe itself: {path / 'recipe.yaml'}"
        raise MissingFile(f"cannot read the recipe: {error.strerror}", where=str(path), mend=mend) from error


def _make_absolute(values: dict[str, Any], folder: Path, *, below: KeyPath = ()) -> None:
    """Makes relative paths absolute in place, where the setting holds a path and the thing looks like one. below: only this part."""
    for path, holder in _path_settings(Recipe, values, ()):
        key = str(path[-1])
        if path[: len(below)] != below:
            continue
        names = _stage_names(values) if key in NAMES_A_STAGE else set()
        value = holder[key]
        if isinstance(value, list):
            holder[key] = [_absolute(text, folder, names) for text in value]
        else:
            holder[key] = _absolute(value, folder, names)


def _absolute(text: Any, folder: Path, names: set[str]) -> Any:
    """A path made absolute, or the value as it is where it is no path."""
    if not isinstance(text, str) or not text or text in names:
        return text
    named = folder / os.path.expanduser(text)
    if os.path.exists(named) or _looks_like_a_path(text):
        return str(named.absolute() if named.is_symlink() else named.resolve())
    return text


def _stage_names(values: dict[str, Any]) -> set[str]:
    """The names of the recipe's stages, which a setting that may name one means before any folder of that name."""
    stages = values.get("stages")
    return {str(stage.get("name")) for stage in stages if isinstance(stage, dict)} if isinstance(stages, list) else set()


def _looks_like_a_path(text: str) -> bool:
    return text.startswith((".", "~", "/")) or text.count("/") > 1 or Path(text).suffix.split(":")[0] in _SUFFIXES


def _path_settings(section: type[BaseModel], values: Any, path: KeyPath) -> Iterator[tuple[KeyPath, dict[str, Any]]]:
    """(where it stands, the mapping that holds it) of every setting that holds a path."""
    if not isinstance(values, dict):
        return
    for name, field in section.model_fields.items():
        if name not in values:
            continue
        if any(isinstance(m, PathMarker) for m in field.metadata) or _holds_path(field.annotation):
            yield (*path, name), values
        for inner in sections_of(field.annotation):
            if isinstance(values[name], list):
                for index, value in enumerate(values[name]):
                    yield from _path_settings(inner, value, (*path, name, index))
            else:
                yield from _path_settings(inner, values[name], (*path, name))


def _holds_path(annotation: Any) -> bool:
    if get_origin(annotation) is Annotated:
        return any(isinstance(m, PathMarker) for m in annotation.__metadata__)
    return get_origin(annotation) in (Union, types.UnionType) and any(_holds_path(a) for a in get_args(annotation))


def _override(values: dict[str, Any], word: str, places: Places) -> None:
    """Applies one `a.b.0.c=value`, whose value is YAML, and notes that what it made stands on the command line."""
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise RecipeError("not of the form key=value", where=f"--set {redact(word)}", mend="write --set stages.0.learning_rate=1e-4")
    place = redact(f"--set {key}")
    value = parse_yaml(text, place)[0] if text else ""
    *parents, last = key.split(".")
    holder: Any = values
    made: KeyPath | None = None
    path: KeyPath = ()
    for part in parents:
        step = _step(holder, part, path, place)
        if isinstance(holder, dict) and not isinstance(holder.get(part), dict | list):
            made = made or (*path, step)
            bare = holder.get(part)
            holder[part] = {"type": bare} if isinstance(bare, str) and part in ("objective", "method") else {}
        path, holder = (*path, step), holder[step]
    step = _step(holder, last, path, place)
    holder[step] = json.loads(json.dumps(value, default=str))
    path = (*path, step)
    for known in [known for known in places if known[: len(path)] == path]:
        del places[known]
    places[made or path] = places[path] = place
    _make_absolute(values, Path.cwd(), below=path)


def _step(holder: Any, part: str, path: KeyPath, place: str) -> str | int:
    """A part of an override's key as the index or key it is there."""
    if isinstance(holder, dict):
        return part
    if not isinstance(holder, list):
        raise RecipeError(f"`{dotted(path)}` has no keys", where=place, mend="use a key of the recipe")
    if not part.isdecimal() or int(part) >= len(holder):
        raise RecipeError(
            f"`{dotted(path)}` has {len(holder)} entries, counted from 0, and `{part}` is none of them",
            where=place,
            mend=f"write an index, such as {dotted((*path, '0'))}",
        )
    return int(part)


def _refuse_secrets(value: Any, clean: Any, path: KeyPath, places: Places, where: str) -> None:
    """Raises RecipeError for the first value or key that the redaction changed; the message does not repeat it."""
    if isinstance(value, dict):
        for (key, inner), (clean_key, clean_inner) in zip(value.items(), clean.items(), strict=True):
            if key != clean_key:
                raise _secret((*path, clean_key), place_of((*path, key), places, where))
            _refuse_secrets(inner, clean_inner, (*path, key), places, where)
    elif isinstance(value, list):
        for index, (inner, clean_inner) in enumerate(zip(value, clean, strict=True)):
            _refuse_secrets(inner, clean_inner, (*path, index), places, where)
    elif value != clean and value == value:  # NaN is equal to nothing
        raise _secret(path, place_of(path, places, where))


def _secret(path: KeyPath, place: str) -> RecipeError:
    return RecipeError(
        f"`{dotted(path)}` holds what looks like a secret, and the run directory repeats the recipe",
        where=place,
        mend="take it out; keys and tokens are read from the environment only (HF_TOKEN and the like)",
    )
