"""From a row's values to a record: which format its keys are, and what it says in that format.

Takes the dict of one row, gives a Conversation or a Document, or raises `RowRefused` with the reason. Knows the OpenAI
`messages`, ShareGPT `conversations`, prompt/completion, Alpaca and plain `text` formats; a new one is a function and a line
in REQUIRED, USED and _READERS.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

from .files import kind_of
from .records import REASONING_KEYS, Conversation, Document, Message, Record, Source, make_conversation, make_document

REQUIRED: dict[str, tuple[str, ...]] = {  # in order of precedence where a row holds the keys of several
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
USED: dict[str, frozenset[str]] = {
    "messages": frozenset({"messages", "tools"}),
    "sharegpt": frozenset({"conversations", "tools", "system"}),
    "prompt_completion": frozenset({"prompt", "completion", "tools", "system"}),
    "alpaca": frozenset({"instruction", "input", "output", "system", "history"}),
    "text": frozenset({"text"}),
}
FIELDS = frozenset().union(*USED.values())
ANSWER_NAMES = (
    "completion",
    "label",
    "labels",
    "category",
    "intent",
    "class",
    "target",
    "answer",
    "answers",
    "response",
    "output",
    "summary",
)
ROLES = ("system", "user", "assistant", "tool")
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "function_call",
}
_UNSUPPORTED = ("function_call", "audio", "refusal", "images")  # message keys that carry content which would be lost

Notes = Counter[str]


class RowRefused(ValueError):
    """Why a row cannot be trained on; goes to the quarantine."""


def short(value: Any) -> str:
    """A value for a sentence: its repr, cut at 40 characters."""
    text = repr(value)
    return text if len(text) <= 40 else text[:39] + "…"


def detect(row: dict[str, Any]) -> tuple[list[str], str]:
    """(formats whose keys the row holds, in order of precedence; why there is none)."""
    held = {key for key, value in row.items() if value is not None}
    found = [name for name, keys in REQUIRED.items() if held.issuperset(keys)]
    if found == ["text"] and (beside := [name for name in ANSWER_NAMES if name in held]):
        map_it = f"data.columns: {{prompt: text, completion: {beside[0]}}}"
        return [], f"`text` stands beside `{beside[0]}`; say which is meant: {map_it}, or data.format: text"
    if found:
        return found, ""
    names = ", ".join(key if key.isidentifier() and len(key) < 40 else short(key) for key in sorted(held)[:8]) or "no keys"
    for name, keys in REQUIRED.items():
        if held.intersection(keys):
            return [], f"missing key {', '.join(f'`{key}`' for key in keys if key not in held)} of a {name} row (it has {names})"
    return [], f"no format has the keys {names}; map them by data.columns, e.g. {{prompt: question, completion: answer}}"


def to_record(row: dict[str, Any], form: str, source: Source, system: str | None, notes: Notes) -> Record:
    """The row read as format `form`. Raises RowRefused."""
    absent = [key for key in REQUIRED[form] if row.get(key) is None]
    if absent:
        raise RowRefused(f"missing key {', '.join(f'`{key}`' for key in absent)} of a {form} row")
    try:
        return _READERS[form](row, source, system, notes)
    except UnicodeEncodeError as error:
        raise RowRefused(f"the text holds a lone surrogate, U+{ord(error.object[error.start]):04X}, which is no character") from error
    except RecursionError as error:
        raise RowRefused("nested too deep") from error
    except (TypeError, ValueError) as error:
        raise error if isinstance(error, RowRefused) else RowRefused(f"a value is not JSON: {error}") from error


def _messages(row: dict[str, Any], source: Source, system: str | None, notes: Notes) -> Conversation:
    messages = [_message(value, f"messages[{index}]", notes) for index, value in enumerate(_list(row["messages"], "messages"))]
    return _conversation(messages, row, source, system)


def _sharegpt(row: dict[str, Any], source: Source, system: str | None, notes: Notes) -> Conversation:
    messages = [Message("system", _text(row["system"], "system"))] if row.get("system") else []
    for index, value in enumerate(_list(row["conversations"], "conversations")):
        where = f"conversations[{index}]"
        if isinstance(value, dict) and "from" not in value and "role" in value:
            messages.append(_message(value, where, notes))
            continue
        turn = _object(value, where)
        given = turn.get("from")
        role = _SHAREGPT_ROLES.get(given.lower()) if isinstance(given, str) else None
        if role is None:
            raise RowRefused(f"{where}.from is {short(given)}, none of {', '.join(_SHAREGPT_ROLES)}")
        text = _text(turn.get("value"), f"{where}.value")
        weight = _weight(turn.get("weight"), "assistant" if role == "function_call" else role, where)
        if role == "function_call":
            messages.append(Message("assistant", "", tool_calls=_tool_calls(text, f"{where}.value"), weight=weight))
        else:
            messages.append(Message(role, text, weight=weight))
    return _conversation(messages, row, source, system)


def _prompt_completion(row: dict[str, Any], source: Source, system: str | None, notes: Notes) -> Conversation:
    """Loss falls on the completion only: an assistant turn in the prompt gets weight 0 unless it says otherwise."""
    messages = [Message("system", _text(row["system"], "system"))] if row.get("system") else []
    prompt, completion = row["prompt"], row["completion"]
    if _is_messages(prompt):
        asked = [_message(value, f"prompt[{index}]", notes) for index, value in enumerate(prompt)]
        messages += [_with_weight_zero(message) if message.role == "assistant" and message.weight is None else message for message in asked]
    else:
        messages.append(Message("user", _text(prompt, "prompt")))
    if _is_messages(completion):
        messages += [_message(value, f"completion[{index}]", notes) for index, value in enumerate(completion)]
    else:
        messages.append(Message("assistant", _text(completion, "completion")))
    return _conversation(messages, row, source, system)


def _alpaca(row: dict[str, Any], source: Source, system: str | None, notes: Notes) -> Conversation:
    messages = [Message("system", _text(row["system"], "system"))] if row.get("system") else []
    for index, pair in enumerate(_list(row.get("history") or [], "history")):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowRefused(f"history[{index}] is not a pair of question and answer")
        messages += [Message("user", _text(pair[0], f"history[{index}][0]")), Message("assistant", _text(pair[1], f"history[{index}][1]"))]
    instruction, further = _text(row["instruction"], "instruction"), _text(row.get("input") or "", "input")
    messages.append(Message("user", f"{instruction}\n\n{further}" if further.strip() else instruction))
    messages.append(Message("assistant", _text(row["output"], "output")))
    return _conversation(messages, row, source, system)


def _document(row: dict[str, Any], source: Source, system: str | None, notes: Notes) -> Document:
    text = _text(row["text"], "text")
    if not text.strip():
        raise RowRefused("empty text")
    return make_document(text, source)


_READERS: dict[str, Callable[[dict[str, Any], Source, str | None, Notes], Record]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "prompt_completion": _prompt_completion,
    "alpaca": _alpaca,
    "text": _document,
}


def _conversation(messages: list[Message], row: dict[str, Any], source: Source, system: str | None) -> Conversation:
    """Checks what every conversation must have, and makes it."""
    if not messages:
        raise RowRefused("no messages")
    if messages[-1].role != "assistant":
        raise RowRefused(f"the last turn is not the assistant's but the {messages[-1].role}'s")
    if all(message.role == "assistant" for message in messages):
        raise RowRefused("nothing stands before the answer")
    for index, message in enumerate(messages):
        if not message.content.strip() and message.role in ("user", "assistant") and not message.tool_calls:
            kind = "empty answer" if message.role == "assistant" else "empty prompt"
            raise RowRefused(f"{kind} (turn {index + 1} of {len(messages)})")
    if all(message.weight == 0 for message in messages if message.role == "assistant"):
        raise RowRefused("every assistant turn has weight 0, so nothing would be learned from the row")
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        tools = _json(tools, "tools")
    made = [_object(tool, f"tools[{index}]") for index, tool in enumerate(_list(tools or [], "tools"))]
    return make_conversation(messages, source, tools=made, system=system)


def _message(value: Any, where: str, notes: Notes) -> Message:
    message = _object(value, where)
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
    thoughts = {_text(message[key], f"{where}.{key}") for key in REASONING_KEYS if message.get(key)}
    if len(thoughts) > 1:
        raise RowRefused(f"{where} holds two different reasonings")
    if thoughts and role != "assistant":
        raise RowRefused(f"{where}: reasoning in a {role} turn")
    return Message(
        role=role,
        content="" if content is None else _text(content, f"{where}.content"),
        reasoning=thoughts.pop() if thoughts else None,
        tool_calls=_tool_calls(calls, f"{where}.tool_calls") if calls is not None else None,
        tool_call_id=_optional_text(message.get("tool_call_id"), f"{where}.tool_call_id"),
        name=_optional_text(message.get("name"), f"{where}.name"),
        weight=_weight(message.get("weight"), role, where),
    )


def _tool_calls(value: Any, where: str) -> tuple[dict[str, Any], ...]:
    """OpenAI's shape, with `arguments` as an object, which is what chat templates take."""
    if isinstance(value, str):
        value = _json(value, where)
    calls = []
    for index, one in enumerate([value] if isinstance(value, dict) else _list(value, where)):
        place = f"{where}[{index}]"
        call = {key: entry for key, entry in _object(one, place).items() if entry is not None}
        function = _object(call["function"], f"{place}.function") if "function" in call else call
        name, arguments = function.get("name"), function.get("arguments", {})
        if not isinstance(name, str) or not name:
            raise RowRefused(f"missing key `name` in {place}")
        if isinstance(arguments, str):
            arguments = _json(arguments, f"{place}.arguments") if arguments.strip() else {}
        made: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": _object(arguments, f"{place}.arguments")}}
        if "id" in call:
            made = {"id": _optional_text(call["id"], f"{place}.id"), **made}
        calls.append(made)
    if not calls:
        raise RowRefused(f"{where} is empty")
    return tuple(calls)


def _text(value: Any, where: str) -> str:
    """Text, or a list of text parts joined; any other part is refused by its type."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise RowRefused(f"wrong type: {where} is {kind_of(value)}, not text")
    texts = []
    for index, part in enumerate(value):
        kind = _object(part, f"{where}[{index}]").get("type")
        if kind != "text":
            raise RowRefused(f"{where}[{index}] is a part of type {short(kind)}; only text parts train yet")
        if not isinstance(part.get("text"), str):
            raise RowRefused(f"wrong type: {where}[{index}].text is {kind_of(part.get('text'))}, not text")
        texts.append(part["text"])
    return "".join(texts)


def _weight(value: Any, role: str, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise RowRefused(f"{where}.weight is {short(value)}, not a number of at least 0")
    if role != "assistant":
        if value:
            raise RowRefused(f"{where}.weight: a {role} turn carries no loss; only an assistant turn has a weight")
        return None
    return float(value)


def _is_messages(value: Any) -> bool:
    """Whether a prompt or completion is a list of messages, and not of text parts."""
    return isinstance(value, list) and bool(value) and all(isinstance(entry, dict) and "role" in entry for entry in value)


def _with_weight_zero(message: Message) -> Message:
    return Message(message.role, message.content, message.reasoning, message.tool_calls, message.tool_call_id, message.name, 0.0)


def _optional_text(value: Any, where: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise RowRefused(f"wrong type: {where} is {kind_of(value)}, not text")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if isinstance(value, str):  # a list in a CSV cell
        value = _json(value, where)
    if not isinstance(value, list):
        raise RowRefused(f"wrong type: {where} is {kind_of(value)}, not a list")
    return value


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RowRefused(f"wrong type: {where} is {kind_of(value)}, not an object")
    return value


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowRefused(f"{where} is text that is no JSON") from error
