"""Records: one row of data, as the rest of the system sees it, whatever file format it came from.

A `Conversation` is messages with an answer at the end, a `Document` is plain text. Both carry a `row_id`, a hash of
their content (the same row has the same id in any file and on any machine; it is never used as a path), and the
`Source` they were read from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")  # what templates and data sets call it; transformers fills the first two


@dataclass(frozen=True, slots=True)
class Source:
    """Where a row was read: the file as it was named, and the line (counted from 1) on which the row begins."""

    path: str
    line: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `weight` is the loss weight of an assistant turn, None where the row does not say."""

    role: str
    content: str
    reasoning: str | None = None
    tool_calls: tuple[dict[str, Any], ...] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    weight: float | None = None

    def to_hf(self) -> dict[str, Any]:
        """The message as a chat template takes it; the reasoning under each name that templates read it by."""
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.reasoning is not None:
            message.update(dict.fromkeys(REASONING_KEYS, self.reasoning))
        if self.tool_calls:
            message["tool_calls"] = [dict(call) for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        if self.name is not None:
            message["name"] = self.name
        return message

    def as_given(self) -> dict[str, Any]:
        """Every field that is set, as plain values: what the row id is the hash of."""
        fields = {
            "role": self.role,
            "content": self.content,
            "reasoning": self.reasoning,
            "tool_calls": list(self.tool_calls) if self.tool_calls else None,
            "tool_call_id": self.tool_call_id,
            "name": self.name,
            "weight": self.weight,
        }
        return {key: value for key, value in fields.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages that end with an assistant turn, and the tools they may call."""

    messages: tuple[Message, ...]
    row_id: str
    source: Source
    tools: tuple[dict[str, Any], ...] | None = None

    def to_hf(self) -> list[dict[str, Any]]:
        """The messages as a chat template takes them."""
        return [message.to_hf() for message in self.messages]

    def prompt(self) -> tuple[Message, ...]:
        """The messages before the last assistant turn: what a candidate is asked."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """The last assistant turn's text; where it only calls tools, the calls as JSON with sorted keys."""
        last = self.messages[-1]
        return last.content if last.content.strip() or not last.tool_calls else canonical(list(last.tool_calls))


@dataclass(frozen=True, slots=True)
class Document:
    """Plain text, every token of which carries loss."""

    text: str
    row_id: str
    source: Source


Record = Conversation | Document


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def content_id(text: str) -> str:
    """A row id: "r" and the first 12 hex digits of the text's sha256. Raises UnicodeEncodeError on a lone surrogate."""
    return "r" + hashlib.sha256(text.encode("utf-8")).hexdigest()[:12]


def make_conversation(
    messages: Sequence[Message], source: Source, *, tools: Sequence[dict[str, Any]] | None = None, system: str | None = None
) -> Conversation:
    """A Conversation whose id is the hash of the row as given; `system` is put first where the row brings none.

    The added system message does not count towards the id, so changing the task's description renames no row.
    """
    row_id = content_id(canonical([[message.as_given() for message in messages], list(tools) if tools else None]))
    if system and all(message.role != "system" for message in messages):
        messages = (Message("system", system), *messages)
    return Conversation(tuple(messages), row_id, source, tuple(tools) if tools else None)


def make_document(text: str, source: Source) -> Document:
    """A Document whose id is the hash of its text."""
    return Document(text, content_id(canonical(text)), source)
