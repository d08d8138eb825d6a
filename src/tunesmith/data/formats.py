"""From a row's values to a record: which format its keys are, and what it says in that format.

Takes the dict of one row, gives its record, or raises `RowRefused` with the reason. Knows the OpenAI `messages`, ShareGPT
`conversations`, prompt/completion, Alpaca and plain `text` formats, and those of preference.py; a new one is a function and
a line in REQUIRED, USED and _READERS.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from . import _preference_formats
from ._values import Notes, RowRefused, is_messages, list_of, message_of, object_of, short, text_of, tool_calls_of, tools_of, weight_of
from .preference import FORMATS_OF, AnyRecord, Kind
from .records import Conversation, Document, Message, Source, make_conversation, make_document

OPENAI_PAIR = ("input", "preferred_output", "non_preferred_output")
"""OpenAI's names of a preference row's keys, beside REQUIRED."""
REQUIRED: dict[str, tuple[str, ...]] = {  # in order of precedence where a row holds the keys of several
    "preference": ("chosen", "rejected"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
    "ranking": ("prompt", "completions"),
    "unpaired": ("prompt", "completion", "label"),
    "prompt": ("prompt",),
}
USED: dict[str, frozenset[str]] = {
    "preference": frozenset({"prompt", "chosen", "rejected", "margin", "tools", "system", *OPENAI_PAIR}),
    "messages": frozenset({"messages", "tools"}),
    "sharegpt": frozenset({"conversations", "tools", "system"}),
    "prompt_completion": frozenset({"prompt", "completion", "tools", "system"}),
    "alpaca": frozenset({"instruction", "input", "output", "system", "history"}),
    "text": frozenset({"text"}),
    "ranking": frozenset({"prompt", "completions", "ranks", "scores", "tools", "system"}),
    "unpaired": frozenset({"prompt", "completion", "label", "tools", "system"}),
    "prompt": frozenset({"prompt", "tools", "system"}),  # and every other key, as a column
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
_ANSWERING = frozenset({"chosen", "rejected", "completions", "completion", "messages", "conversations", *OPENAI_PAIR[1:]})
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


def detect(row: dict[str, Any], kinds: Sequence[Kind] = ()) -> tuple[list[str], str]:
    """(formats whose keys the row holds, the one to take first; why there is none). kinds: those that are wanted; none for any."""
    held = {key for key, value in row.items() if value is not None}
    found = [form for form in REQUIRED if held.issuperset(required(form, row))]
    if "unpaired" in found:  # a label that is no truth value is another column of an answer to train on, unless labels are wanted
        found.remove("prompt_completion" if isinstance(row["label"], bool) or "unpaired" in kinds else "unpaired")
    if found != ["prompt"] and "prompt" in found:
        found.remove("prompt")
    if found == ["prompt"] and held & _ANSWERING:
        found = []
    if found == ["text"] and (beside := [name for name in ANSWER_NAMES if name in held]):
        map_it = f"data.columns: {{prompt: text, completion: {beside[0]}}}"
        return [], f"`text` stands beside `{beside[0]}`; say which is meant: {map_it}, or data.format: text"
    if found:
        wanted = [form for kind in kinds for form in found if form in FORMATS_OF[kind]]
        return [*wanted, *(form for form in found if form not in wanted)], ""
    return [], _why_none(row, held, kinds)


def required(form: str, row: dict[str, Any]) -> tuple[str, ...]:
    """The keys that the format asks of this row: a pair has two sets of names."""
    return OPENAI_PAIR if form == "preference" and any(row.get(key) is not None for key in OPENAI_PAIR[1:]) else REQUIRED[form]


def a_row(form: str) -> str:
    """A row of a format, for a sentence."""
    return f"{'an' if form[0] in 'aeiou' else 'a'} {form} row"


def _why_none(row: dict[str, Any], held: set[str], kinds: Sequence[Kind]) -> str:
    names = ", ".join(key if key.isidentifier() and len(key) < 40 else short(key) for key in sorted(held)[:8])
    wanted = [form for kind in kinds for form in FORMATS_OF[kind]]
    for form in sorted(REQUIRED, key=lambda form: (form not in wanted, form in ("unpaired", "prompt"))):
        keys = required(form, row)
        telling = held.intersection(keys) - (
            {"prompt", "label"} if form == "ranking" or (form == "unpaired" and form not in wanted) else set()
        )
        if telling and (absent := [key for key in keys if key not in held]):
            return f"missing key {', '.join(f'`{key}`' for key in absent)} of {a_row(form)} (it has {names})"
    if not held:
        return "the row is empty"
    return f"no format has the keys {names}; map them by data.columns, e.g. {{prompt: question, completion: answer}}"


def to_record(row: dict[str, Any], form: str, source: Source, system: str | None, notes: Notes) -> AnyRecord:
    """The row read as format `form`. Raises RowRefused."""
    absent = [key for key in required(form, row) if row.get(key) is None]
    if absent:
        raise RowRefused(f"missing key {', '.join(f'`{key}`' for key in absent)} of {a_row(form)}")
    try:
        return _READERS[form](row, source, system, notes)
    except UnicodeEncodeError as error:
        raise RowRefused(f"the text holds a lone surrogate, U+{ord(error.object[error.start]):04X}, which is no character") from error
    except RecursionError as error:
        raise RowRefused("nested too deep") from error
    except OverflowError as error:
        raise RowRefused("a number is too large") from error
    except (TypeError, ValueError) as error:
        raise error if isinstance(error, RowRefused) else RowRefused(f"a value is not JSON: {error}") from error


def _messages(row: dict[str, Any], source: Source, system: str | None, notes: Notes) -> Conversation:
    messages = [message_of(value, f"messages[{index}]", notes) for index, value in enumerate(list_of(row["messages"], "messages"))]
    return _conversation(messages, row, source, system)


def _sharegpt(row: dict[str, Any], source: Source, system: str | None, notes: Notes) -> Conversation:
    messages = [Message("system", text_of(row["system"], "system"))] if row.get("system") else []
    for index, value in enumerate(list_of(row["conversations"], "conversations")):
        where = f"conversations[{index}]"
        if isinstance(value, dict) and "from" not in value and "role" in value:
            messages.append(message_of(value, where, notes))
            continue
        turn = object_of(value, where)
        given = turn.get("from")
        role = _SHAREGPT_ROLES.get(given.lower()) if isinstance(given, str) else None
        if role is None:
            raise RowRefused(f"{where}.from is {short(given)}, none of {', '.join(_SHAREGPT_ROLES)}")
        text = text_of(turn.get("value"), f"{where}.value")
        weight = weight_of(turn.get("weight"), "assistant" if role == "function_call" else role, where)
        if role == "function_call":
            messages.append(Message("assistant", "", tool_calls=tool_calls_of(text, f"{where}.value"), weight=weight))
        else:
            messages.append(Message(role, text, weight=weight))
    return _conversation(messages, row, source, system)


def _prompt_completion(row: dict[str, Any], source: Source, system: str | None, notes: Notes) -> Conversation:
    """Loss falls on the completion only: an assistant turn in the prompt gets weight 0 unless it says otherwise."""
    messages = [Message("system", text_of(row["system"], "system"))] if row.get("system") else []
    prompt, completion = row["prompt"], row["completion"]
    if is_messages(prompt):
        asked = [message_of(value, f"prompt[{index}]", notes) for index, value in enumerate(prompt)]
        messages += [_with_weight_zero(message) if message.role == "assistant" and message.weight is None else message for message in asked]
    else:
        messages.append(Message("user", text_of(prompt, "prompt")))
    if is_messages(completion):
        messages += [message_of(value, f"completion[{index}]", notes) for index, value in enumerate(completion)]
    else:
        messages.append(Message("assistant", text_of(completion, "completion")))
    return _conversation(messages, row, source, system)


def _alpaca(row: dict[str, Any], source: Source, system: str | None, notes: Notes) -> Conversation:
    messages = [Message("system", text_of(row["system"], "system"))] if row.get("system") else []
    for index, pair in enumerate(list_of(row.get("history") or [], "history")):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowRefused(f"history[{index}] is not a pair of question and answer")
        messages += [
            Message("user", text_of(pair[0], f"history[{index}][0]")),
            Message("assistant", text_of(pair[1], f"history[{index}][1]")),
        ]
    instruction, further = text_of(row["instruction"], "instruction"), text_of(row.get("input") or "", "input")
    messages.append(Message("user", f"{instruction}\n\n{further}" if further.strip() else instruction))
    messages.append(Message("assistant", text_of(row["output"], "output")))
    return _conversation(messages, row, source, system)


def _document(row: dict[str, Any], source: Source, system: str | None, notes: Notes) -> Document:
    text = text_of(row["text"], "text")
    if not text.strip():
        raise RowRefused("empty text")
    return make_document(text, source)


_READERS: dict[str, Callable[[dict[str, Any], Source, str | None, Notes], AnyRecord]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "prompt_completion": _prompt_completion,
    "alpaca": _alpaca,
    "text": _document,
    **_preference_formats.READERS,
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
    return make_conversation(messages, source, tools=tools_of(row), system=system)


def _with_weight_zero(message: Message) -> Message:
    return Message(message.role, message.content, message.reasoning, message.tool_calls, message.tool_call_id, message.name, 0.0)
