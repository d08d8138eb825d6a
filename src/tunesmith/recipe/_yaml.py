"""YAML to plain values, each with the line it stands on: safe tags only, YAML 1.2 numbers, a size cap.

`parse_yaml` gives the values and a map from a key's path, such as ("stages", 0, "learning_rate"), to its line.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from ..errors import RecipeError

MAX_BYTES = 1_000_000  # a recipe is written by hand; a megabyte of it is not a recipe
MAX_NODES = 50_000  # what an alias bomb would pass long before memory is gone

Lines = dict[tuple[str | int, ...], int]


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's core numbers and booleans: 2e-4 is a float, `on` and `no` are text."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if tag not in ("tag:yaml.org,2002:float", "tag:yaml.org,2002:bool", "tag:yaml.org,2002:int")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"),
    list("-+.0123456789"),
)


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(node.value)


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def parse_yaml(text: str, where: str) -> tuple[Any, Lines]:
    """Values of a YAML text and the line of each key path. Raises RecipeError with the line."""
    if len(text.encode()) > MAX_BYTES:
        raise RecipeError(
            f"the recipe is larger than {MAX_BYTES} bytes", where=where, mend="point to data by path; do not put it in the recipe"
        )
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        lines: Lines = {}
        if node is not None:
            _walk(node, (), lines, where, [0])
        return (loader.construct_document(node) if node is not None else None), lines
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}:{mark.line + 1}" if mark else where
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RecipeError(f"not readable as YAML: {problem}", where=place, mend="plain mappings, lists, text and numbers only") from error
    except RecursionError as error:
        raise RecipeError("nested too deeply", where=where, mend="a recipe is four levels deep") from error
    except ValueError as error:
        raise RecipeError(
            f"not readable as YAML: {str(error)[:200]}", where=where, mend="plain mappings, lists, text and numbers only"
        ) from error


def _walk(node: yaml.Node, path: tuple[str | int, ...], lines: Lines, where: str, count: list[int]) -> None:
    count[0] += 1
    if count[0] > MAX_NODES:
        raise RecipeError("too many nodes, counting each alias", where=where, mend="write the values out")
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else str(key.start_mark)
            if name in seen:
                raise RecipeError(f"`{name}` is given twice", where=f"{where}:{key.start_mark.line + 1}", mend="keep one of the two")
            seen.add(name)
            lines[(*path, name)] = key.start_mark.line + 1
            _walk(value, (*path, name), lines, where, count)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _walk(value, (*path, index), lines, where, count)
