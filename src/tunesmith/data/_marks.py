"""Marks around what the row brings, so that it is found again in the rendered text.

Each text of a conversation (content, reasoning, the names and string arguments of tool calls) gets a mark, a sentinel, before and after
it, inside its own outer whitespace, so that a template that trims still trims. The template renders the marked conversation; taking the
marks out must give exactly the real render, else the template looks into its content and nothing is certain. What lies between two
marks is the row's; everything else the template wrote.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from .records import REASONING_KEYS


class Field(NamedTuple):
    """A marked text: of which message (index), what it is (content, reasoning, name, argument), and the text."""

    message: int
    kind: str
    text: str


class Mark(NamedTuple):
    """A mark found: which field, whether it opens it, and where it stood, in characters of the text without marks."""

    field: int
    opens: bool
    position: int


class Marked(NamedTuple):
    """A conversation with marks. A field's number stands in its two marks."""

    messages: list[dict[str, Any]]
    fields: list[Field]
    nonce: str


class Located(NamedTuple):
    """A rendered text without its marks, and the marks in order of position."""

    text: str
    marks: list[Mark]


def strings(value: Any) -> Iterator[str]:
    """Every string in a nest of lists and dicts, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from strings(item)


def mark(messages: Sequence[dict[str, Any]]) -> Marked:
    """The messages (as transformers takes them) with marks; blank texts get none, as templates ask whether they are there."""
    everything = "\0".join(strings(list(messages)))
    count = 0
    while (nonce := f"Zq{count}w") in everything:
        count += 1
    fields: list[Field] = []

    def wrap(index: int, kind: str, text: str) -> str:
        inner = text.strip()
        if not inner:
            return text
        fields.append(Field(index, kind, text))
        lead = len(text) - len(text.lstrip())
        number = len(fields) - 1
        return f"{text[:lead]}{nonce}{number}oZ{inner}{nonce}{number}cZ{text[lead + len(inner) :]}"

    def wrap_leaves(index: int, value: Any) -> Any:
        if isinstance(value, str):
            return wrap(index, "argument", value)
        if isinstance(value, dict):
            return {key: wrap_leaves(index, item) for key, item in value.items()}
        return [wrap_leaves(index, item) for item in value] if isinstance(value, (list, tuple)) else value

    marked = []
    for index, message in enumerate(messages):
        copy = dict(message)
        if names := [key for key in REASONING_KEYS if isinstance(copy.get(key), str)]:
            copy.update(dict.fromkeys(names, wrap(index, "reasoning", copy[names[0]])))
        content = copy.get("content")
        if isinstance(content, str):
            copy["content"] = wrap(index, "content", content)
        elif content:
            copy["content"] = [{**part, "text": wrap(index, "content", part["text"])} for part in content]
        if copy.get("tool_calls"):
            copy["tool_calls"] = [_mark_call(call, index, wrap, wrap_leaves) for call in copy["tool_calls"]]
        marked.append(copy)
    return Marked(marked, fields, nonce)


def _mark_call(call: dict[str, Any], index: int, wrap: Any, wrap_leaves: Any) -> dict[str, Any]:
    inner = call.get("function") if isinstance(call.get("function"), dict) else call
    changed = {**inner}
    if isinstance(inner.get("name"), str):
        changed["name"] = wrap(index, "name", inner["name"])
    if "arguments" in inner:
        changed["arguments"] = wrap_leaves(index, inner["arguments"])
    return {**call, "function": changed} if inner is not call else changed


def unmarked(messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None) -> Iterator[str]:
    """The row's strings that get no mark: roles, ids, names of arguments, tools. They must hold no control token."""
    for message in messages:
        for key, value in message.items():
            if key == "tool_calls":
                for call in value:
                    yield from strings(call)
            elif key not in ("content", *REASONING_KEYS):
                yield from strings(value)
    yield from strings(tools)


def locate(rendered: str, marked: Marked) -> Located:
    """Takes the marks out of a rendered text. A function's name may be written again (in its result's header): only the first counts."""
    pieces, marks, position, last = [], [], 0, 0
    seen = set()
    for match in re.finditer(rf"{marked.nonce}(\d+)([oc])Z", rendered):
        piece = rendered[last : match.start()]
        pieces.append(piece)
        position += len(piece)
        last = match.end()
        key = (int(match[1]), match[2] == "o")
        if marked.fields[key[0]].kind == "name" and key in seen:
            continue
        seen.add(key)
        marks.append(Mark(*key, position))
    pieces.append(rendered[last:])
    return Located("".join(pieces), marks)


def data_spans(located: Located, fields: Sequence[Field]) -> list[tuple[int, int, int]]:
    """(start, end, message index) of each marked text in the rendered text, in characters, by position."""
    opened: dict[int, int] = {}
    spans = []
    for number, opens, position in located.marks:
        if opens:
            opened[number] = position
        elif number in opened:
            spans.append((opened.pop(number), position, fields[number].message))
    return spans
