"""Scores of JSON answers against a reference under a JSON Schema.

Takes the schema once (`OutputFields.from_schema`), then one output and one reference at a time. Enum and boolean fields are labels,
free strings are text fields (ROUGE-L), anything else is a value field, compared by JSON equality. An answer that is not strict JSON
or breaks the schema has no fields: all its scores are 0 and its labels count as wrong predictions.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import jsonschema
from referencing import Registry

from ..errors import RecipeError
from .text import rouge_l

ABSENT = ""
"""The label of an optional field that an answer leaves out; never a JSON text."""


@dataclass(frozen=True)
class OutputFields:
    """A schema's fields by how they are scored, in the schema's own order."""

    schema: dict[str, Any]
    labels: tuple[str, ...]
    values: tuple[str, ...]
    texts: tuple[str, ...]
    validator: Any = field(repr=False, compare=False)

    @property
    def exact(self) -> tuple[str, ...]:
        """The fields that exact_match demands: labels and values."""
        return self.labels + self.values

    @classmethod
    def from_schema(cls, schema: Any, *, where: str = "task.output_schema") -> OutputFields:
        """Sorts the schema's top-level properties into labels, values and texts.

        Raises RecipeError for what is no JSON Schema, does not describe an object with properties, or refers outside itself.
        """
        if not isinstance(schema, dict):
            raise RecipeError("the output schema is not a JSON object", where=where, mend="write a JSON Schema with type: object")
        kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        try:
            kind.check_schema(schema)
        except jsonschema.SchemaError as error:
            raise RecipeError(f"the output schema is not a valid JSON Schema: {error.message}", where=where) from error
        _check_references(schema, schema, where)
        root = _resolved(schema, schema, where)
        properties = root.get("properties")
        if not isinstance(properties, dict) or not properties:
            mend = "give it type: object and properties"
            raise RecipeError("the output schema describes no object with properties", where=where, mend=mend)
        sorts: dict[str, list[str]] = {"labels": [], "values": [], "texts": []}
        for name, part in properties.items():
            sorts[_sort_of(_resolved(part, schema, where))].append(name)
        # An empty registry: a schema never makes this process fetch anything.
        validator = kind(schema, registry=Registry())
        return cls(schema, tuple(sorts["labels"]), tuple(sorts["values"]), tuple(sorts["texts"]), validator)


@dataclass(frozen=True)
class ItemScore:
    """One answer's scores: metric to number in [0, 1], and field to the predicted label (None: no valid answer)."""

    scores: dict[str, float]
    labels: dict[str, str | None]


def canonical(value: Any) -> str:
    """The one JSON text of a JSON value, so that equal values have equal texts (1 is 1.0 but not true).

    >>> canonical({"b": 1.0, "a": True}) == canonical({"a": True, "b": 1}), canonical(1) == canonical(True)
    (True, False)
    """
    return json.dumps(_plain(value), sort_keys=True, ensure_ascii=False)


def label_of(parsed: dict[str, Any], name: str) -> str:
    """The label text of a field: its canonical JSON, or ABSENT."""
    return canonical(parsed[name]) if name in parsed else ABSENT


def parse_output(text: str, fields: OutputFields) -> dict[str, Any] | None:
    """The answer as a dict if it is strict JSON (no NaN, no repeated key, nothing around it) and fits the schema, else None."""
    try:
        parsed = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError):
        return None
    if not isinstance(parsed, dict) or not fields.validator.is_valid(parsed):
        return None
    return parsed


def score_structured(prediction: str, reference: str, fields: OutputFields) -> ItemScore:
    """Scores one answer: json_validity, exact_match, field_accuracy, field_accuracy.FIELD, and rougeL where there are text fields.

    exact_match: valid and every label and value field right; a schema of text fields only demands equal texts.
    The reference must be valid (ValueError otherwise: a task refuses such items when it is frozen).
    """
    truth = parse_output(reference, fields)
    if truth is None:
        raise ValueError("the reference does not satisfy the output schema")
    answer = parse_output(prediction, fields)
    right = {name: float(answer is not None and label_of(answer, name) == label_of(truth, name)) for name in fields.exact}
    whole = all(right.values()) if right else answer is not None and canonical(answer) == canonical(truth)
    scores = {"json_validity": float(answer is not None), "exact_match": float(answer is not None and whole)}
    if right:
        scores["field_accuracy"] = sum(right.values()) / len(right)
        scores.update({f"field_accuracy.{name}": value for name, value in right.items()})
    if fields.texts:
        pairs = [(_text(answer, name), _text(truth, name)) for name in fields.texts]
        scores["rougeL"] = sum(rouge_l(ours, theirs) for ours, theirs in pairs) / len(pairs) if answer is not None else 0.0
    labels = {name: label_of(answer, name) if answer is not None else None for name in fields.labels}
    return ItemScore(scores, labels)


def _sort_of(part: Any) -> str:
    if not isinstance(part, dict):
        return "values"
    kinds = part.get("type")
    kinds = set(kinds) if isinstance(kinds, list) else {kinds}
    if "enum" in part or "const" in part or kinds - {"null"} == {"boolean"}:
        return "labels"
    return "texts" if kinds - {"null"} == {"string"} else "values"


def _resolved(part: Any, root: dict[str, Any], where: str) -> Any:
    """Follows local references, also the `allOf: [{$ref}]` that generators of schemas write."""
    for _ in range(32):
        if not isinstance(part, dict):
            return part
        if isinstance(part.get("$ref"), str):
            part = {**{key: value for key, value in part.items() if key != "$ref"}, **_target(part["$ref"], root, where)}
        elif isinstance(part.get("allOf"), list) and len(part["allOf"]) == 1 and isinstance(part["allOf"][0], dict):
            part = {**{key: value for key, value in part.items() if key != "allOf"}, **part["allOf"][0]}
        else:
            return part
    raise RecipeError("the output schema's references go in a circle", where=where)


def _target(reference: str, root: dict[str, Any], where: str) -> dict[str, Any]:
    found: Any = root
    if not reference.startswith("#/"):
        raise RecipeError(f"the output schema refers outside itself: {reference}", where=where, mend="copy the definition under $defs")
    for step in reference[2:].split("/"):
        step = step.replace("~1", "/").replace("~0", "~")
        found = found.get(step) if isinstance(found, dict) else None
    if not isinstance(found, dict):
        raise RecipeError(f"the output schema refers to {reference}, which it does not hold", where=where)
    return found


def _check_references(part: Any, root: dict[str, Any], where: str) -> None:
    if isinstance(part, dict):
        if isinstance(part.get("$ref"), str) and part["$ref"] != "#":
            _target(part["$ref"], root, where)
        for value in part.values():
            _check_references(value, root, where)
    elif isinstance(part, list):
        for value in part:
            _check_references(value, root, where)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise ValueError("a key occurs twice")
    return unique


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _text(parsed: dict[str, Any] | None, name: str) -> str:
    value = (parsed or {}).get(name)
    return value if isinstance(value, str) else ""
