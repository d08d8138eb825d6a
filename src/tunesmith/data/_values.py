"""The values of a row: text, lists, messages and tool calls, each checked, with where it stands where it is refused.

Takes a JSON value and the name of its place in the row; gives the value as records hold it, or raises `RowRefused` with the reason.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

from .files import kind_of
from .records import REASONING_KEYS, Message

ROLES = ("system", "user", "assistant", "tool")
_UNSUPPORTED = ("function_call", "audio", "refusal", "images")  # message keys that carry content which would be lost

Notes = Counter[str]


class RowRefused(ValueError):
    """Why a row cannot be trained on; goes to the quarantine."""


def short(value: Any) -> str:
    """A value for a sentence: its repr, cut at 40 characters."""
    text = repr(value)
    return text if len(text) <= 40 else text[:39] + "…"


def message_of(value: Any, where: str, notes: Notes) -> Message:
    """A turn, with every field that trains or is written by templates; what would be lost is refused."""
    message = object_of(value, where)
    role = message.get("role")
    if role == "developer":
        role = "system"
        notes["developer turns read as system turns"] += 1
    if role not in ROLES:
        raise RowRefused(
            f"{where}.role is {short(role)}, none of {', '.join(ROLES)}" if role is not None else f"missing key `role` in {where}"
        )
    if lost := [key for key in _UNSUPPORTED if message.get(key)]:
        raise RowRefused(f"{where} holds `{lost[0]}`, which cannot be trained on yet")
    calls = message.get("tool_calls") or None
    if calls is not None and role != "assistant":
        raise RowRefused(f"{where}: tool_calls in a {role} turn")
    content = message.get("content")
    if content is None and calls is None:
        raise RowRefused(f"missing key `content` in {where}")
    thoughts = {text_of(message[key], f"{where}.{key}") for key in REASONING_KEYS if message.get(key)}
    if len(thoughts) > 1:
        raise RowRefused(f"{where} holds two different reasonings")
    if thoughts and role != "assistant":
        raise RowRefused(f"{where}: reasoning in a {role} turn")
    return Message(
        role=role,
        content="" if content is None else text_of(content, f"{where}.content"),
        reasoning=thoughts.pop() if thoughts else None,
        tool_calls=tool_calls_of(calls, f"{where}.tool_calls") if calls is not None else None,
        tool_call_id=_optional_text(message.get("tool_call_id"), f"{where}.tool_call_id"),
        name=_optional_text(message.get("name"), f"{where}.name"),
        weight=weight_of(message.get("weight"), role, where),
    )


def tool_calls_of(value: Any, where: str) -> tuple[dict[str, Any], ...]:
    """OpenAI's shape, with `arguments` as an object, which is what chat templates take."""
    if isinstance(value, str):
        value = json_of(value, where)
    calls = []
    for index, one in enumerate([value] if isinstance(value, dict) else list_of(value, where)):
        place = f"{where}[{index}]"
        call = {key: entry for key, entry in object_of(one, place).items() if entry is not None}
        function = object_of(call["function"], f"{place}.function") if "function" in call else call
        name, arguments = function.get("name"), function.get("arguments", {})
        if not isinstance(name, str) or not name:
            raise RowRefused(f"missing key `name` in {place}")
        if isinstance(arguments, str):
            arguments = json_of(arguments, f"{place}.arguments") if arguments.strip() else {}
        made: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": object_of(arguments, f"{place}.arguments")}}
        if "id" in call:
            made = {"id": _optional_text(call["id"], f"{place}.id"), **made}
        calls.append(made)
    if not calls:
        raise RowRefused(f"{where} is empty")
    return tuple(calls)


def tools_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The row's tools, which may be JSON text (a CSV cell); none where it brings none."""
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        tools = json_of(tools, "tools")
    return [object_of(tool, f"tools[{index}]") for index, tool in enumerate(list_of(tools or [], "tools"))]


def text_of(value: Any, where: str) -> str:
    """Text, or a list of text parts joined; any other part is refused by its type."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise RowRefused(f"wrong type: {where} is {kind_of(value)}, not text")
    texts = []
    for index, part in enumerate(value):
        kind = object_of(part, f"{where}[{index}]").get("type")
        if kind != "text":
            raise RowRefused(f"{where}[{index}] is a part of type {short(kind)}; only text parts train yet")
        if not isinstance(part.get("text"), str):
            raise RowRefused(f"wrong type: {where}[{index}].text is {kind_of(part.get('text'))}, not text")
        texts.append(part["text"])
    return "".join(texts)


def weight_of(value: Any, role: str, where: str) -> float | None:
    """A turn's loss weight: a finite number of at least 0, of an assistant turn only."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise RowRefused(f"{where}.weight is {short(value)}, not a number of at least 0")
    if role != "assistant":
        if value:
            raise RowRefused(f"{where}.weight: a {role} turn carries no loss; only an assistant turn has a weight")
        return None
    return float(value)


def is_messages(value: Any) -> bool:
    """Whether a prompt or completion is a list of messages, and not of text parts."""
    return isinstance(value, list) and bool(value) and all(isinstance(entry, dict) and "role" in entry for entry in value)


def _optional_text(value: Any, where: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise RowRefused(f"wrong type: {where} is {kind_of(value)}, not text")
    return value


def list_of(value: Any, where: str) -> list[Any]:
    """A list, or the JSON of one in a CSV cell."""
    if isinstance(value, str):  # a list in a CSV cell
        value = json_of(value, where)
    if not isinstance(value, list):
        raise RowRefused(f"wrong type: {where} is {kind_of(value)}, not a list")
    return value


def object_of(value: Any, where: str) -> dict[str, Any]:
    """A JSON object."""
    if not isinstance(value, dict):
        raise RowRefused(f"wrong type: {where} is {kind_of(value)}, not an object")
    return value


def json_of(text: str, where: str) -> Any:
    """What a text is the JSON of."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowRefused(f"{where} is text that is no JSON") from error
