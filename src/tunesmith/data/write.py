"""Writing records of preferences as JSON lines, in the formats that `read_records` reads.

What is written reads back as the same records, with the same ids (but for a system message that the task's description had put first,
which is then the row's own). Pairs are written in TRL's shape, OpenAI's, or as Anthropic's HH dialogues.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from ..errors import DataRefused
from ..rundir import write_text
from ._preference_formats import hh_turns
from .preference import FORMATS_OF, AnyRecord, Kind, Preference, PreferencePair, PromptOnly, Ranking, Unpaired, kind_of_record
from .records import Conversation, Document, Message

Format = Literal["preference", "ranking", "unpaired", "prompt"]
PairStyle = Literal["trl", "openai", "hh"]


def write_records(path: str | Path, records: Iterable[Preference], form: Format, *, pairs: PairStyle = "trl") -> None:
    """Writes records of one kind as JSON lines in format `form`, whole or not at all.

    pairs: the shape of preference rows. Raises DataRefused for a record that the format cannot hold, StorageFailed where the disk refuses.
    """
    lines = []
    for record in records:
        if form not in FORMATS_OF[kind_of_record(record)]:
            kind: Kind = kind_of_record(record)
            raise DataRefused(
                f"a record of kind {kind} cannot be written as {form}", where=record.row_id, mend=f"its format: {FORMATS_OF[kind][0]}"
            )
        row = _PAIRS[pairs](record) if isinstance(record, PreferencePair) else row_of(record)
        lines.append(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
    write_text(Path(path), "".join(lines))


def row_of(record: AnyRecord) -> dict[str, Any]:
    """The record as a row of its format's own keys: messages for conversations, text for documents, TRL's shape for pairs."""
    match record:
        case Document():
            return {"text": record.text}
        case Conversation():
            return _with_tools({"messages": _messages(record.messages)}, record)
        case PreferencePair():
            row: dict[str, Any] = {name: _messages(getattr(record, name)) for name in ("prompt", "chosen", "rejected")}
            return _with_tools(row | _margin(record), record)
        case Ranking():
            answers = [_messages(answer) for answer in record.answers]
            return _with_tools({"prompt": _messages(record.prompt), "completions": answers, "ranks": [*range(1, len(answers) + 1)]}, record)
        case Unpaired():
            row = {"prompt": _messages(record.prompt), "completion": _messages(record.completion), "label": record.label}
            return _with_tools(row, record)
        case PromptOnly():
            return _with_tools({"prompt": _messages(record.prompt), **record.columns}, record)


def _openai(record: PreferencePair) -> dict[str, Any]:
    asked = _with_tools({"messages": _messages(record.prompt)}, record)
    outputs = {"preferred_output": _messages(record.chosen), "non_preferred_output": _messages(record.rejected)}
    return {"input": asked, **outputs} | _margin(record)


def _hh(record: PreferencePair) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name in ("chosen", "rejected"):
        turns = [*record.prompt, *getattr(record, name)]
        names = {"user": "Human", "assistant": "Assistant"}
        text = "".join(f"\n\n{names.get(turn.role, turn.role)}: {turn.content}" for turn in turns)
        if hh_turns(text) != turns or record.tools or len(getattr(record, name)) != 1:
            raise DataRefused(
                "an HH dialogue holds nothing but plain turns of a human and an assistant", where=record.row_id, mend="write pairs as trl"
            )
        row[name] = text
    return row | _margin(record)


_PAIRS: dict[PairStyle, Callable[[PreferencePair], dict[str, Any]]] = {"trl": row_of, "openai": _openai, "hh": _hh}


def _messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    return [message.as_given() for message in messages]


def _margin(record: PreferencePair) -> dict[str, Any]:
    return {} if record.margin is None else {"margin": record.margin}


def _with_tools(row: dict[str, Any], record: AnyRecord) -> dict[str, Any]:
    tools = None if isinstance(record, Document) else record.tools
    return row | {"tools": list(tools)} if tools else row
