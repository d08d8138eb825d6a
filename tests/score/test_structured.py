"""JSON answers: what is valid, what is right, what a schema's fields are."""

from __future__ import annotations

import json

import pytest

from tunesmith.errors import RecipeError
from tunesmith.score import OutputFields, canonical, parse_output, rouge_l, score_structured

TICKET = {
    "type": "object",
    "properties": {
        "intent": {"enum": ["defect", "refund"]},
        "urgency": {"type": "string", "enum": ["low", "high"]},
        "summary": {"type": "string"},
    },
    "required": ["intent", "urgency", "summary"],
    "additionalProperties": False,
}
REFERENCE = json.dumps({"intent": "defect", "urgency": "low", "summary": "lamp is dead"})


@pytest.fixture
def fields():
    return OutputFields.from_schema(TICKET)


def ticket(**changes):
    return json.dumps({**json.loads(REFERENCE), **changes})


def test_enum_fields_are_labels_and_free_strings_are_texts(fields):
    assert (fields.labels, fields.texts, fields.values) == (("intent", "urgency"), ("summary",), ())


def test_a_wrong_summary_leaves_exact_match_and_shows_in_rouge_l(fields):
    scores = score_structured(ticket(summary="the lamp"), REFERENCE, fields).scores
    assert scores == {
        "json_validity": 1.0,
        "exact_match": 1.0,
        "field_accuracy": 1.0,
        "field_accuracy.intent": 1.0,
        "field_accuracy.urgency": 1.0,
        "rougeL": rouge_l("the lamp", "lamp is dead"),
    }


def test_one_wrong_label_ends_exact_match_and_halves_the_field_accuracy_of_two(fields):
    found = score_structured(ticket(urgency="high"), REFERENCE, fields)
    assert found.scores["exact_match"] == 0.0
    assert found.scores["field_accuracy"] == 0.5
    assert found.scores["field_accuracy.intent"] == 1.0
    assert found.labels == {"intent": '"defect"', "urgency": '"high"'}


@pytest.mark.parametrize(
    "output",
    [
        "",
        "not json",
        "```json\n" + REFERENCE + "\n```",
        REFERENCE + " and more",
        ticket(intent="other"),
        ticket(extra=1),
        '{"intent": "defect", "urgency": "low"}',
        '{"intent": "refund", "intent": "defect", "urgency": "low", "summary": "lamp is dead"}',
        REFERENCE.replace('"lamp is dead"', "NaN"),
        "[" * 100_000,
        json.dumps([json.loads(REFERENCE)]),
        REFERENCE.replace("}", ', "n": ' + "9" * 5000 + "}"),
    ],
)
def test_an_answer_that_is_no_valid_ticket_has_only_zeros_and_no_labels(fields, output):
    found = score_structured(output, REFERENCE, fields)
    assert set(found.scores.values()) == {0.0}
    assert found.labels == {"intent": None, "urgency": None}


def test_whitespace_around_and_key_order_do_not_matter(fields):
    turned = json.dumps(dict(reversed(json.loads(REFERENCE).items())), indent=2)
    assert score_structured(f"\n {turned}\n", REFERENCE, fields).scores["exact_match"] == 1.0


def test_value_fields_are_compared_as_json_so_that_one_is_one_point_zero_but_not_true():
    fields = OutputFields.from_schema({"type": "object", "properties": {"n": {}, "tags": {"type": "array"}, "ok": {"type": "boolean"}}})
    assert (fields.labels, fields.values, fields.texts) == (("ok",), ("n", "tags"), ())
    reference = '{"n": 1, "tags": ["a"], "ok": true}'
    assert score_structured('{"n": 1.0, "tags": ["a"], "ok": true}', reference, fields).scores["exact_match"] == 1.0
    assert score_structured('{"n": true, "tags": ["a"], "ok": true}', reference, fields).scores["exact_match"] == 0.0
    assert score_structured('{"n": 1, "tags": ["b"], "ok": true}', reference, fields).scores["field_accuracy.tags"] == 0.0
    assert score_structured('{"n": 1, "tags": ["a"]}', reference, fields).scores["field_accuracy.ok"] == 0.0


def test_nan_and_infinity_are_no_json_even_where_the_schema_allows_any_number():
    fields = OutputFields.from_schema({"type": "object", "properties": {"n": {"type": "number"}}})
    assert parse_output('{"n": 1.5}', fields) == {"n": 1.5}
    assert [parse_output(f'{{"n": {word}}}', fields) for word in ("NaN", "Infinity", "-Infinity")] == [None] * 3


def test_a_schema_of_texts_only_demands_equal_texts_for_exact_match():
    fields = OutputFields.from_schema({"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]})
    assert score_structured('{"a": "x"}', '{"a": "y"}', fields).scores["exact_match"] == 0.0
    assert score_structured('{"a": "y"}', '{"a": "y"}', fields).scores["exact_match"] == 1.0


def test_references_within_a_schema_are_followed_as_schema_generators_write_them():
    fields = OutputFields.from_schema(
        {
            "$defs": {"Mood": {"enum": ["good", "bad"], "type": "string"}},
            "type": "object",
            "properties": {"mood": {"allOf": [{"$ref": "#/$defs/Mood"}]}, "note": {"type": ["string", "null"]}},
        }
    )
    assert (fields.labels, fields.texts) == (("mood",), ("note",))
    assert parse_output('{"mood": "ugly"}', fields) is None


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ([], "not a JSON object"),
        ({"type": "strin"}, "not a valid JSON Schema"),
        ({"type": "object"}, "no object with properties"),
        ({"type": "object", "properties": {"a": {"$ref": "http://127.0.0.1:9/x.json"}}}, "outside itself"),
        ({"type": "object", "properties": {"a": {"items": {"$ref": "#/$defs/none"}}}}, "does not hold"),
        ({"$defs": {"a": {"$ref": "#/$defs/a"}}, "type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}}, "circle"),
    ],
)
def test_a_schema_that_cannot_be_used_is_refused_in_words(schema, says):
    with pytest.raises(RecipeError, match=says) as caught:
        OutputFields.from_schema(schema, where="ticket.schema.json")
    assert caught.value.where == "ticket.schema.json"


def test_equal_json_values_have_one_text_and_different_ones_two():
    assert canonical({"b": [1.0], "a": "é"}) == canonical({"a": "é", "b": [1]})
    assert len({canonical(value) for value in (1, True, "1", None, "null", [1], 1.5)}) == 7
