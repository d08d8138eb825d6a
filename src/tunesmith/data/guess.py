"""What a data file is probably for: which columns are prompt and answer, what kind of answers they are, their JSON Schema.

Only `tunesmith init` guesses, and writes what it guessed into a recipe with a comment; reading never does.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from .formats import ANSWER_NAMES, detect

PROMPT_NAMES = (
    *("prompt", "text", "question", "query", "message", "utterance", "sentence", "instruction", "input", "content", "review", "comment"),
    *("request", "document", "article", "body", "title"),
)
_ANSWERS = (*ANSWER_NAMES, "reply", "sentiment", "translation", "class_name", "topic", "result")
_IDENTIFIERS = ("id", "idx", "index", "uid", "uuid", "row_id", "unnamed: 0", "")
_ABOUT_A_TEXT = ("source", "url", "domain", "lang", "language", "split", "dataset", "meta", "date", "timestamp", "title", "author")
_COMMON = 0.9  # of the rows that must have a column before it is proposed

MOST_LABELS = 150  # distinct answers of a classification
LABEL_CHARACTERS = 80
MOST_ENUM = 50  # distinct values of a JSON field that is proposed as an enum
ROWS_A_LABEL = 2  # on average, at least; fewer, and the answers are texts of their own
ROWS_AN_ENUM_VALUE = 3
WORDS_OF_A_TEXT = 5  # of a CSV header's field, from which it is no column's name

Kind = Literal["classification", "json", "free", "documents"]


def guess_columns(rows: Sequence[dict[str, Any]]) -> dict[str, str] | None:
    """data.columns for rows of keys of their own: our field to the file's column; None where it cannot be told.

    By the values for lists of messages, else by the names, else, of two columns, by length: the longer is the prompt.
    """
    forms = {form for row in rows for form in detect(row)[0]}
    if not rows or forms - {"text", "prompt"}:
        return None
    counts = Counter(key for row in rows for key, value in row.items() if value not in (None, ""))
    common = [key for key, count in counts.items() if count >= _COMMON * len(rows) and key.lower() not in _IDENTIFIERS]
    for key in common:
        for field, wanted in (("messages", {"role", "content"}), ("conversations", {"from", "value"})):
            if all(_is_list_of(row.get(key), wanted) for row in rows if row.get(key)):
                return {field: key}
    texts = [key for key in common if all(isinstance(row.get(key, ""), str | int | None) for row in rows)]
    prompt, answer = _named(texts, PROMPT_NAMES), _named(texts, _ANSWERS)
    if len(texts) == 1:
        return {"text": texts[0]} if not forms else None
    if len(texts) == 2:
        lengths = {key: sum(len(str(row.get(key, ""))) for row in rows) for key in texts}
        longer, shorter = sorted(texts, key=lambda key: -lengths[key])
        prompt, answer = {
            (True, True): (prompt, answer),
            (True, False): (prompt, texts[1 - texts.index(prompt)] if prompt else None),
            (False, True): (texts[1 - texts.index(answer)] if answer else None, answer),
            (False, False): (longer, shorter),
        }[prompt is not None, answer is not None]
    if not prompt or not answer or prompt == answer:
        return None
    if "text" in forms and (answer.lower() in _ABOUT_A_TEXT or answer_kind([str(row.get(answer, "")) for row in rows]) != "classification"):
        return None  # rows that read as documents are only a classification where the other column looks like its labels
    return {"prompt": prompt, "completion": answer}


def _named(keys: Sequence[str], names: Sequence[str]) -> str | None:
    by_name = {key.lower(): key for key in reversed(keys)}
    return next((by_name[name] for name in names if name in by_name), None)


def _is_list_of(value: Any, wanted: set[str]) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(entry, dict) and wanted <= entry.keys() for entry in value)


def lacks_header(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether the keys of a table's rows are themselves a row: none is a usual column's name, and one is long or a value of its own column.

    >>> lacks_header([{"the lamp is broken": "it smells", "defect": "defect"}])
    True
    """
    keys = [key for key in rows[0] if key] if rows else []
    if any(key.lower() in {*PROMPT_NAMES, *_ANSWERS, *_IDENTIFIERS, *_ABOUT_A_TEXT} for key in keys):
        return False
    return any(len(key.split()) >= WORDS_OF_A_TEXT or any(row.get(key) == key for row in rows) for key in keys)


def answer_kind(answers: Sequence[str]) -> Kind:
    """JSON where every answer is an object; classification where they are few, short and repeated; else free text."""
    if answers and all(json_object(answer) is not None for answer in answers):
        return "json"
    distinct = set(answers)
    short = all(len(answer) <= LABEL_CHARACTERS and "\n" not in answer for answer in distinct)
    few = 2 <= len(distinct) <= MOST_LABELS and len(distinct) * ROWS_A_LABEL <= len(answers)
    return "classification" if few and short else "free"


def json_object(text: str) -> dict[str, Any] | None:
    """The object that a text is the JSON of, or None."""
    if not text.lstrip().startswith("{"):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def derive_schema(objects: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The narrowest plain JSON Schema that all objects satisfy; strings of few, repeated values become an enum."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_schema(list(objects))}


def _schema(values: list[Any]) -> dict[str, Any]:
    kinds: dict[str, list[Any]] = {}
    for value in values:
        kinds.setdefault(_kind(value), []).append(value)
    if {"integer", "number"} <= kinds.keys():
        kinds["number"] += kinds.pop("integer")
    made = [_schema_of_kind(kind, members) for kind, members in kinds.items()]
    return made[0] if len(made) == 1 else {"anyOf": made} if made else {}


def _kind(value: Any) -> str:
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return kinds.get(type(value), "null")


def _schema_of_kind(kind: str, values: list[Any]) -> dict[str, Any]:
    if kind == "object":
        keys = list(dict.fromkeys(key for value in values for key in value))
        properties = {key: _schema([value[key] for value in values if key in value]) for key in keys}
        required = [key for key in keys if all(key in value for value in values)]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    if kind == "array":
        items = _schema([item for value in values for item in value])
        return {"type": "array", "items": items} if items else {"type": "array"}
    if kind == "string":
        distinct = set(values)
        short = all(len(value) <= LABEL_CHARACTERS for value in distinct)
        if short and len(distinct) <= MOST_ENUM and len(distinct) * ROWS_AN_ENUM_VALUE <= len(values):
            return {"type": "string", "enum": sorted(distinct)}
    return {"type": kind}
