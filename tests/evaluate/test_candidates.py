"""How candidates are asked: the examples as turns, the context, the decoding; and the poisoned generation_config."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.generate.helpers import NumberTokenizer, prompts_with_prefix
from tunesmith.data.records import Message
from tunesmith.errors import DataRefused, TunesmithError
from tunesmith.evaluate import derive_max_new_tokens, freeze_task
from tunesmith.evaluate.candidates import decoding, encode_items, generate_answers, with_examples
from tunesmith.evaluate.perplexity import reference_nats
from tunesmith.evaluate.scoring import score_answers
from tunesmith.generate import GREEDY, LocalGenerator

from .helpers import SCHEMA, ScriptedGenerator, WordEncoder, desk_rows, row


def test_examples_are_real_turns_between_the_system_message_and_the_question():
    messages = (Message("system", "s"), Message("user", "q"))
    examples = [(Message("user", "a"), Message("assistant", "b")), (Message("user", "c"), Message("assistant", "d"))]
    found = [(message.role, message.content) for message in with_examples(messages, examples)]
    assert found == [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "q")]
    assert [message.content for message in with_examples(messages[1:], examples)] == ["a", "b", "c", "d", "q"]


def test_base_candidates_decode_under_the_schema_and_the_tuned_model_freely():
    task, text = freeze_task("task", [], schema=SCHEMA), freeze_task("task", [])
    assert [decoding(name, task) for name in ("zero_shot", "few_shot", "tuned")] == ["constrained", "constrained", "free"]
    assert decoding("zero_shot", text) == "free"


def test_where_the_context_is_full_examples_are_left_out_from_the_end_with_a_note():
    task, encoder = freeze_task("task", [row("one two three", "x")]), WordEncoder()
    example = (Message("user", "a b c d e"), Message("assistant", "f"))
    free = {"max_new_tokens": 3, "context_length": None}
    bare, with_one = (len(encode_items(task, encoder, examples=given, **free).prompts[0]) for given in ((), (example,)))
    asked = encode_items(task, encoder, examples=[example] * 3, max_new_tokens=3, context_length=with_one + 3)
    assert len(asked.prompts[0]) == with_one > bare
    assert asked.notes == ("1 of 1 items of task got fewer than 3 examples: the context is full",)


def test_an_item_that_fits_in_no_way_is_refused_by_its_id():
    task = freeze_task("task", [row("one two three", "x"), row("one", "x")])
    with pytest.raises(DataRefused, match=task.items[0].item_id):
        encode_items(task, WordEncoder(), max_new_tokens=4, context_length=13)


def test_a_reference_longer_than_the_answers_limit_counts_towards_the_context():
    task = freeze_task("task", [row("one", "a b c d e f")])
    length = len(encode_items(task, WordEncoder(), max_new_tokens=1, context_length=None).prompts[0])
    with pytest.raises(DataRefused):
        encode_items(task, WordEncoder(), max_new_tokens=1, context_length=length + 6)


def test_the_longest_answer_allowed_is_half_as_much_again_as_the_longest_known():
    assert derive_max_new_tokens([3, 40, 41]) == 62


def test_a_generator_that_loses_an_answer_is_an_error_and_no_score():
    encoder = WordEncoder()
    generator = ScriptedGenerator(encoder, lambda text: "x")
    generator.generate = lambda prompts, **_: []
    with pytest.raises(TunesmithError, match="1 prompts but 0 answers"):
        generate_answers(generator, [encoder.ids("a")], max_new_tokens=1, constraint=None)


def test_decoding_is_greedy_by_the_callers_word():
    encoder = WordEncoder()
    generator = ScriptedGenerator(encoder, lambda text: "x y")
    (answer,) = generate_answers(generator, [encoder.ids("a")], max_new_tokens=5, constraint=None)
    assert generator.calls[0]["sampling"] is GREEDY
    assert (answer.text, answer.finish_reason, answer.tokens) == ("x y", "stop", 3)


def test_a_poisoned_generation_config_changes_no_score():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.3,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    prompts = prompts_with_prefix(6)
    task = freeze_task("task", [row(f"item {number}", "1 2 3 4") for number in range(len(prompts))], metrics=["rougeL"])

    def scores():
        generator = LocalGenerator(model, NumberTokenizer(0))
        texts = [answer.text for answer in generate_answers(generator, prompts, max_new_tokens=8, constraint=None)]
        nats = reference_nats(generator, prompts, [[1, 2, 3, 4]] * len(prompts))
        scored = score_answers(task, "tuned", texts, nats, template_sha256="t")
        return texts, scored.metrics_json(resamples=100, confidence=0.95, seed=0)

    clean = scores()
    poison = {
        "do_sample": True,
        "temperature": 9.0,
        "top_k": 2,
        "top_p": 0.3,
        "repetition_penalty": 5.0,
        "no_repeat_ngram_size": 1,
        "min_new_tokens": 8,
        "max_length": 2,
        "num_beams": 3,
        "suppress_tokens": list(range(1, 90)),
    }
    for name, value in poison.items():
        setattr(model.generation_config, name, value)
    assert scores() == clean


def test_desk_rows_have_distinct_ids():
    assert len({one.row_id for one in desk_rows(40)}) == 40
