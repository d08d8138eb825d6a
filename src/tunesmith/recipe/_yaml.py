"""YAML to plain values, each with the line it stands on, and back: plain tags only, YAML 1.2 numbers, a size cap.

`parse_yaml` gives the values and a map from a key's path, such as ("stages", 0, "learning_rate"), to its line; `dump_yaml` writes
text that `parse_yaml` reads back as it was.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from ..errors import RecipeError

MAX_BYTES = 200_000  # a recipe is written by hand; ten of its longest would fit
MAX_NODES = 50_000  # what an alias bomb would pass long before memory is gone

UNREADABLE = (
    "look at this line and the one above: one section's keys begin in one column, and text with `: ` or ` #` in it stands in quotes"
)

Lines = dict[tuple[str | int, ...], int]

_TAG = "tag:yaml.org,2002:"
_PLAIN = {_TAG + kind for kind in ("str", "int", "float", "bool", "null", "map", "seq", "value", "merge")}
_OTHER_RULES = {_TAG + kind for kind in ("float", "bool", "int", "timestamp")}  # those of YAML 1.1, which ours replace
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_INT = re.compile(r"^[-+]?[0-9]+$")
_FLOAT = re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$")


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's core numbers and booleans: 2e-4 is a float; `on`, `no` and dates are text."""


class _Dumper(yaml.SafeDumper):
    """SafeDumper that also quotes text which `_Loader` would take for a number."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _OTHER_RULES]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_TAG + "bool", _BOOL, list("tTfF"))
_Loader.add_implicit_resolver(_TAG + "int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver(_TAG + "float", _FLOAT, list("-+.0123456789"))
_Dumper.add_implicit_resolver(_TAG + "float", _FLOAT, list("-+.0123456789"))


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(node.value)


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar(_TAG + "str", text, style='"' if "\x85" in text else None)  # a line break, which other styles fold


_Loader.add_constructor(_TAG + "int", _construct_int)
_Dumper.add_representer(str, _represent_text)


def dump_yaml(values: Any) -> str:
    """Plain values as YAML."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=140)


def parse_yaml(text: str, where: str) -> tuple[Any, Lines]:
    """Values of a YAML text and the line of each key path. Raises RecipeError with the line."""
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
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
        raise RecipeError(f"not readable as YAML: {problem}", where=place, mend=UNREADABLE) from error
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
    if node.tag not in _PLAIN:
        kind = node.tag.replace(_TAG, "!!")
        raise RecipeError(f"the tag {kind} is not taken", where=f"{where}:{node.start_mark.line + 1}", mend="write plain text or a number")
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
