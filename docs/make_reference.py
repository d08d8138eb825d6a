"""Writes docs/recipe.md, the page of every setting, from the recipe's own classes and docstrings.

    python docs/make_reference.py

`page()` gives the text; tests/test_docs.py compares it with the committed file.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from tunesmith.recipe import Recipe
from tunesmith.recipe._base import PathMarker, Section

PAGE = Path(__file__).with_name("recipe.md")
BOUNDS = {Ge: ("ge", "at least"), Gt: ("gt", "above"), Le: ("le", "at most"), Lt: ("lt", "below")}
SCALARS = {str: "text", int: "whole number", float: "number", bool: "`true` or `false`", type(None): "`null`"}
HEAD = """\
<!-- Written by docs/make_reference.py from the docstrings in src/tunesmith/recipe. Change those, then run it again. -->

# The recipe

A recipe is the one description of a run: YAML, or a dict of the same shape. `tunesmith init FILE` writes one from a data file;
`tunesmith plan RECIPE` prints it with the derived settings filled in.

- **Strict.** An unknown key or a wrong value is refused before anything heavy is loaded, with its line, the nearest known key or what
  the setting means, and exit status 2.
- **Numbers and words.** YAML 1.2: `2e-4` is a number, `on` and `no` are text.
- **Paths** in a recipe start at the recipe's folder; paths in `--set` and `--out` start at the current one.
- **Overrides.** `--set key=value` wins over the file: `--set stages.0.learning_rate=1e-4`. List entries are counted from 0.
- **Short forms.** `objective: sft` and `method: lora` stand for that type with its defaults.
- **Derived settings** have the default `null`; their meaning says what they become. The run's own `recipe.yaml` holds those of the model,
  the data and the stages written out, and repeats the run.
- **Secrets** do not belong in a recipe; one that holds something like a key is refused. Keys come from the environment (`HF_TOKEN`).
- **Editors** complete and check recipes by a JSON Schema: `tunesmith schema > recipe.schema.json`, and the first line
  `# yaml-language-server: $schema=recipe.schema.json`.

A setting without a default must be given.
"""
EXAMPLE = """\
## An example

```yaml
{quickstart}```
"""


def page() -> str:
    """The whole page."""
    quickstart = Path(__file__).parents[1].joinpath("recipes", "quickstart.yaml").read_text(encoding="utf-8")
    parts = [HEAD, EXAMPLE.format(quickstart=quickstart)]
    parts += [_table(section, places) for section, places in _sections().items()]
    return "\n".join(parts)


@cache
def _sections() -> dict[type[Section], list[str]]:
    """Every section, in the order of the recipe, with the keys under which it stands."""
    found: dict[type[Section], list[str]] = {Recipe: [""]}

    def walk(section: type[Section], place: str) -> None:
        for name, field in section.model_fields.items():
            for inner in _inner(field.annotation):
                many = get_origin(field.annotation) is list
                where = f"{place}.{name}{'[]' if many else ''}".lstrip(".")
                known = inner in found
                found.setdefault(inner, []).append(where)
                if not known:
                    walk(inner, where)

    walk(Recipe, "")
    return found


def _inner(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in get_args(annotation):
        yield from _inner(argument)


def _title(section: type[Section], places: Sequence[str]) -> str:
    kind = section.model_fields.get("type")
    where = " and ".join(f"`{place}`" for place in places if place) or "Top level"
    return f"{where}, `type: {kind.default}`" if kind else where


def _anchor(section: type[Section]) -> str:
    """The id that a heading gets, on the site and elsewhere."""
    return re.sub(r"[^\w -]", "", _title(section, _sections()[section]).lower()).replace(" ", "-")


def _table(section: type[Section], places: Sequence[str]) -> str:
    lines = [f"## {_title(section, places)}", "", (section.__doc__ or "").strip(), ""]
    lines += ["| setting | takes | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in section.model_fields.items():
        cells = [f"`{name}`", _takes(field), _default(field), field.description or ""]
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "must be given"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Section):
        return "its defaults"
    if isinstance(value, bool) or value is None:
        return {None: "`null`", True: "`true`", False: "`false`"}[value]
    if isinstance(value, list | tuple):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _takes(field: FieldInfo) -> str:
    return _words(field.annotation, field.metadata)


def _words(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """A type in words, with its bounds."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _words(arguments[0], [*arguments[1:], *metadata])
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_words(argument) for argument in arguments))
    if origin is Literal:
        return ", ".join(f"`{argument}`" for argument in arguments)
    if origin is list:
        return f"list of {_words(arguments[0])}"
    if origin is dict:
        return f"mapping of {_words(arguments[0])} to {_words(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        kind = annotation.model_fields.get("type")
        return f"[{kind.default if kind else 'section'}](#{_anchor(annotation)})"
    if any(isinstance(mark, PathMarker) for mark in metadata):
        return "path or name"
    bounds = [f"{word} {value:g}" for value, word in _bounds(metadata)]
    return f"{SCALARS[annotation]} {' and '.join(bounds)}".strip()


def _bounds(metadata: Sequence[Any]) -> Iterator[tuple[float, str]]:
    for mark in metadata:
        if isinstance(mark, FieldInfo):
            yield from _bounds(mark.metadata)
        for kind, (attribute, word) in BOUNDS.items():
            if isinstance(mark, kind):
                yield getattr(mark, attribute), word


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
