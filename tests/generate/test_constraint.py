"""Constraints on the real tokenizer and a random model: whatever it would say, the answer is valid."""

from __future__ import annotations

import json

import jsonschema
import numpy as np
import pytest
import torch

from tests.generate.helpers import NumberTokenizer
from tunesmith.errors import ModelError, RecipeError
from tunesmith.generate import LocalGenerator, Sampling, choice_constraint, constraint, json_schema_constraint

TICKET = {
    "type": "object",
    "properties": {
        "intent": {"enum": ["refund", "refund_status", "sonstiges – Ärger"]},
        "urgent": {"type": "boolean"},
        "count": {"type": "integer", "minimum": 0, "maximum": 50},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 6}, "maxItems": 2},
        "note": {"type": "string", "maxLength": 12},
    },
    "required": ["intent", "urgent", "count", "tags", "note"],
    "additionalProperties": False,
}
PROMPTS = [[11 + i, 300 + 7 * i, 5] for i in range(12)]
SAMPLINGS = [Sampling(), Sampling(temperature=1.0, seed=1), Sampling(temperature=5.0, seed=2), Sampling(1.0, top_p=0.5, top_k=50, seed=3)]


@pytest.fixture
def generator(random_llama, smollm2_tokenizer):
    return LocalGenerator(random_llama, smollm2_tokenizer, batch_size=5)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_random_model_under_a_schema_says_valid_json_or_is_cut_by_the_limit(generator, smollm2_tokenizer, sampling):
    generations = generator.generate(
        PROMPTS, max_new_tokens=150, sampling=sampling, constraint=json_schema_constraint(TICKET, smollm2_tokenizer)
    )
    finished = [generation for generation in generations if generation.finish_reason == "stop"]
    assert len(finished) >= 6
    for generation in finished:
        ticket = json.loads(generation.text)
        jsonschema.validate(ticket, TICKET)
        assert list(ticket) == list(TICKET["properties"])
    for generation in generations:
        if generation.finish_reason == "length":
            assert len(generation.token_ids) == 150


def test_a_label_outside_the_first_plane_can_be_said(generator, smollm2_tokenizer):
    labels = ["😀 happy", "Ärger", 'say "no" \\ \n twice']
    for number, label in enumerate(labels):
        generations = generator.generate(
            PROMPTS,
            max_new_tokens=40,
            sampling=Sampling(temperature=1.0, seed=number),
            constraint=choice_constraint([label], smollm2_tokenizer),
        )
        assert {generation.text for generation in generations} == {label}


def test_white_space_is_that_of_json_dumps(generator, smollm2_tokenizer):
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["x", "y"]}, "b": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    generations = generator.generate(
        PROMPTS, max_new_tokens=60, sampling=Sampling(3.0), constraint=json_schema_constraint(schema, smollm2_tokenizer)
    )
    for generation in generations:
        assert generation.text == json.dumps(json.loads(generation.text))


def test_a_complete_answer_stops_the_row_without_a_stop_token(generator, smollm2_tokenizer):
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
    for generation in generator.generate(PROMPTS, max_new_tokens=60, constraint=json_schema_constraint(schema, smollm2_tokenizer)):
        assert generation.finish_reason == "stop"
        assert generation.text in ('{"a": true}', '{"a": false}')
        assert smollm2_tokenizer.eos_token_id not in generation.token_ids


def test_a_choice_is_one_of_the_labels_and_a_label_may_begin_with_another(generator, smollm2_tokenizer):
    labels = ["card", "card_lost", 'quo"te\n\\', "café – Ä", "a b"]
    generations = generator.generate(
        [[i, i + 1] for i in range(5, 85)],
        max_new_tokens=40,
        sampling=Sampling(2.0),
        constraint=choice_constraint(labels, smollm2_tokenizer),
    )
    assert {generation.text for generation in generations} == set(labels)
    assert {generation.finish_reason for generation in generations} == {"stop"}


def test_masked_logits_leave_only_what_the_grammar_allows_and_never_an_unused_token(smollm2_tokenizer):
    matcher = choice_constraint(["yes", "no"], smollm2_tokenizer).matcher()
    logits = torch.zeros(len(smollm2_tokenizer) + 37)
    matcher.mask_(logits)
    allowed = {smollm2_tokenizer.decode([token]) for token in logits.isfinite().nonzero().flatten().tolist()}
    assert allowed <= {"y", "ye", "yes", "n", "no"}
    assert {"y", "n"} <= allowed


def test_rows_under_a_constraint_do_not_depend_on_their_batch(random_llama, smollm2_tokenizer):
    settings = dict(max_new_tokens=40, sampling=Sampling(1.5, seed=4), constraint=json_schema_constraint(TICKET, smollm2_tokenizer))
    one, five = (LocalGenerator(random_llama, smollm2_tokenizer, batch_size=size).generate(PROMPTS, **settings) for size in (1, 5))
    assert one == five


def test_stop_tokens_beside_the_tokenizers_own_may_end_a_choice(smollm2_tokenizer):
    other = smollm2_tokenizer.convert_tokens_to_ids("<|endoftext|>")
    matcher = choice_constraint(["card", "card_lost"], smollm2_tokenizer, stop_ids=[other]).matcher()
    for token in smollm2_tokenizer("card", add_special_tokens=False).input_ids:
        assert not matcher.accept(token)
    logits = torch.zeros(len(smollm2_tokenizer))
    matcher.mask_(logits)
    assert logits[[other, smollm2_tokenizer.eos_token_id]].isfinite().all()
    assert matcher.accept(other)


def test_a_grammar_is_compiled_once_and_another_order_of_properties_is_another_grammar(smollm2_tokenizer):
    first = json_schema_constraint(TICKET, smollm2_tokenizer)
    assert json_schema_constraint(json.loads(json.dumps(TICKET)), smollm2_tokenizer) is first
    backwards = TICKET | {"properties": dict(reversed(TICKET["properties"].items()))}
    assert json_schema_constraint(backwards, smollm2_tokenizer) is not first
    assert len({key[1] for key in constraint._compiled if constraint._compiled[key] is first}) == 1


def test_a_token_outside_the_grammar_is_an_error_and_not_silently_taken(smollm2_tokenizer):
    matcher = choice_constraint(["yes", "no"], smollm2_tokenizer).matcher()
    with pytest.raises(RuntimeError, match="outside the grammar"):
        matcher.accept(smollm2_tokenizer("maybe", add_special_tokens=False).input_ids[0])


def test_what_has_no_grammar_is_refused(smollm2_tokenizer):
    with pytest.raises(RecipeError, match="at least one label"):
        choice_constraint([], smollm2_tokenizer)
    with pytest.raises(RecipeError, match="no empty one"):
        choice_constraint(["a", ""], smollm2_tokenizer)
    with pytest.raises(RecipeError, match="no grammar"):
        json_schema_constraint({"type": "nonsense"}, smollm2_tokenizer)
    with pytest.raises(ModelError, match="no end token"):
        choice_constraint(["a"], NumberTokenizer(eos_token_id=None))


def test_unconstrained_rows_of_the_random_model_are_not_json(generator):
    """The tests above prove something: left alone, the model says nothing valid."""
    for generation in generator.generate(PROMPTS, max_new_tokens=20, sampling=Sampling(1.0)):
        with pytest.raises(json.JSONDecodeError):
            json.loads(generation.text)
    assert np.isfinite(generator.logprobs(PROMPTS[:1], [[1, 2]])[0]).all()


def test_a_json_string_with_a_length_limit_holds_no_control_character(smollm2_tokenizer):
    schema = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 5}}, "required": ["a"], "additionalProperties": False}
    matcher = json_schema_constraint(schema, smollm2_tokenizer).matcher()
    for token in smollm2_tokenizer('{"a": "b').input_ids:
        matcher.accept(token)
    logits = torch.zeros(len(smollm2_tokenizer))
    matcher.mask_(logits)
    allowed = [smollm2_tokenizer.decode([token]) for token in logits.isfinite().nonzero().flatten().tolist()]
    assert len(allowed) > 1000
    assert not [text for text in allowed if any(ord(character) < 0x20 for character in text)]
