"""Rendering: prompts that are the beginning of what is trained on, and no control token from a row's text."""

from __future__ import annotations

import copy
import json
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
from tests.data.rendering import (
    CALL,
    STOCK,
    TOOL,
    TOOLS,
    TURNS,
    assistant,
    conversation,
    fuzz,
    supervised,
    template_of,
    user,
    with_tokens,
)
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tunesmith.data.records import Message
from tunesmith.data.render import Rendered, colourise, encode_prompt, encode_prompts, render, render_records, stop_tokens
from tunesmith.data.template import NAMED_TEMPLATES, ChatTemplate, load_template
from tunesmith.errors import ModelError, TemplateError


def test_of_ten_thousand_fuzzed_contents_none_gives_a_control_token(smollm2_tokenizer, smollm2_template):
    specials = list(smollm2_tokenizer.get_added_vocab())
    cut = [token[:end] for token in specials for end in (1, 4, len(token) - 1)] + [token[1:] for token in specials]
    pieces = specials + cut + ["\n", " ", "assistant", "é😀", "a word ", "<", "|>", "</s>", "\0"]
    source = random.Random(11)
    rows = [conversation(user(fuzz(source, pieces)), assistant("ok" + fuzz(source, pieces))) for _ in range(10_000)]
    control = np.zeros(len(smollm2_tokenizer), dtype=bool)
    control[list(smollm2_tokenizer.get_added_vocab().values())] = True
    texts = 0
    for row, rendered in zip(rows, render_records(rows, smollm2_template, smollm2_tokenizer), strict=True):
        assert isinstance(rendered, Rendered), rendered
        assert smollm2_tokenizer.convert_ids_to_tokens(rendered.ids[control[rendered.ids]].tolist()) == ["<|im_start|>", "<|im_end|>"] * 3
        if any(token in row.messages[0].content for token in specials):
            texts += 1
            assert row.messages[0].content in smollm2_tokenizer.decode(rendered.ids)
    assert texts > 1000


def test_a_control_token_s_text_is_tokenised_alike_in_training_and_in_the_prompt(smollm2_tokenizer, smollm2_template):
    specials = list(smollm2_tokenizer.get_added_vocab())
    source = random.Random(5)
    for _ in range(200):
        row = conversation(user(fuzz(source, [*specials, "x", "\n", " "])), assistant(fuzz(source, [*specials, "x", "\n", " "]) + "."))
        rendered = render(row, smollm2_template, smollm2_tokenizer)
        prompt = encode_prompt(row.prompt(), smollm2_template, smollm2_tokenizer)
        assert rendered.ids[: len(prompt)].tolist() == prompt.tolist()


def test_a_control_token_in_a_tool_a_role_or_a_name_is_refused(smollm2_tokenizer):
    tokenizer = with_tokens(smollm2_tokenizer, STOCK["qwen2_5"])
    template = template_of(STOCK["qwen2_5"], tokenizer)
    evil = json.loads(json.dumps(TOOL).replace("The weather.", "<|im_end|>"))
    assert render(TOOLS, template, tokenizer).prompt_length
    for row in (
        conversation(*TOOLS.messages, tools=(evil,)),
        conversation(Message("user<|im_end|>", "q"), assistant("a")),
        conversation(user("q", name="<|im_start|>"), assistant("a")),
    ):
        with pytest.raises(TemplateError, match="control token"):
            render(row, template, tokenizer)
        with pytest.raises(TemplateError, match="control token"):
            encode_prompt(row.prompt(), template, tokenizer, tools=row.tools)


def test_markup_that_is_a_token_is_one_in_an_answer_and_text_in_a_question(smollm2_tokenizer):
    tokenizer = copy.deepcopy(smollm2_tokenizer)
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("<other>", special=False)])
    template = template_of(NAMED_TEMPLATES["chatml"].text + "{# <think> #}", tokenizer)
    rendered = render(conversation(user("<think> <other>"), assistant("<think> <|im_end|>")), template, tokenizer)
    tokens = tokenizer.convert_ids_to_tokens(rendered.ids.tolist())
    assert (tokens.count("<think>"), tokens.count("<other>"), tokens.count("<|im_end|>")) == (1, 1, 2)
    assert rendered.weights[tokens.index("<think>")] == 1


def test_a_thousand_fuzzed_pairs_keep_the_prompt_s_tokens_and_come_back_as_text(smollm2_tokenizer, smollm2_template):
    pieces = ["\n", "\n\n", " ", "  ", "\t", "word", "Word", "é", "😀", "1", "{", '"', "中", "'s", "\r\n", "-"]
    source = random.Random(4)
    rows = [conversation(user(fuzz(source, pieces) + "?"), assistant(fuzz(source, pieces) + ".")) for _ in range(1000)]
    prompts = encode_prompts([row.prompt() for row in rows], smollm2_template, smollm2_tokenizer)
    for row, prompt, rendered in zip(rows, prompts, render_records(rows, smollm2_template, smollm2_tokenizer), strict=True):
        assert rendered.ids[: rendered.prompt_length].tolist() == prompt.tolist()
        assert supervised(rendered, smollm2_tokenizer) == [row.answer + "<|im_end|>"]
        assert smollm2_tokenizer.decode(rendered.ids) == smollm2_template.render(row.to_hf())


def test_a_token_that_would_span_the_end_of_the_prompt_is_split_there(smollm2_tokenizer):
    template = template_of(
        NAMED_TEMPLATES["chatml"].text.replace("assistant\\n", "assistant-").replace("+ '\\n' +", "+ '-' +", 1), smollm2_tokenizer
    )
    row = conversation(user("q"), assistant("---"))
    whole = smollm2_tokenizer(template.render(row.to_hf()), add_special_tokens=False).input_ids
    rendered = render(row, template, smollm2_tokenizer)
    prompt = encode_prompt(row.prompt(), template, smollm2_tokenizer)
    assert whole[: len(prompt)] != prompt.tolist()  # tokenised as a whole, the dash of the prompt runs into the answer
    assert rendered.ids[: len(prompt)].tolist() == prompt.tolist()
    assert supervised(rendered, smollm2_tokenizer) == ["---<|im_end|>"]


@pytest.mark.parametrize("scheme", ["first", "always", "normalizer"])
def test_a_tokenizer_that_puts_a_space_before_the_text_gets_no_second_one(scheme):
    pieces = ["<unk>", "<s>", "</s>", "<|u|>", "<|a|>", "▁", "\n", *"<|ua>/s:qx.", "▁q", "▁x", "▁:"]
    backend = Tokenizer(
        models.BPE({piece: number for number, piece in enumerate(pieces)}, [("▁", "q"), ("▁", "x"), ("▁", ":")], unk_token="<unk>")
    )
    if scheme == "normalizer":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>", unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|u|>", "<|a|>"]})
    text = "{% for m in messages %}{{ '<|' + m.role[0] + '|>' + m.content + ('</s>' if m.role == 'assistant' else '') }}{% endfor %}"
    template = template_of(text + "{% if add_generation_prompt %}<|a|>{% endif %}", tokenizer)
    row = conversation(user("q x"), assistant("x q"))
    rendered = render(row, template, tokenizer)
    assert rendered.ids.tolist() == tokenizer(template.render(row.to_hf()), add_special_tokens=False).input_ids
    forged = render(conversation(user("q</s>x"), assistant("x")), template, tokenizer)
    tokens = tokenizer.convert_ids_to_tokens(forged.ids.tolist())
    assert tokens.count("</s>") == 1
    assert "".join(tokens).replace("▁", "") == "<|u|>q</s>x<|a|>x</s>"
    assert tokens[tokens.index("<") + 1] == "/"  # no space came in where the text was split


def test_a_template_that_looks_into_the_content_is_refused(smollm2_tokenizer):
    text = "{% for m in messages %}{{ '<|im_start|>' + m.content + ('!' if m.content.startswith('q') else '') + '<|im_end|>' }}{% endfor %}"
    template = template_of(text, smollm2_tokenizer)
    with pytest.raises(TemplateError, match="other text when a message's content changes"):
        render(conversation(user("q"), assistant("a")), template, smollm2_tokenizer)
    assert isinstance(render(conversation(user("other"), assistant("a")), template, smollm2_tokenizer), Rendered)


@pytest.mark.parametrize(
    "assistant_turn, reason",
    [
        ("{{ m.content }}{{ m.content }}<|im_end|>", "more than once"),
        ("<|im_end|>", "leaves it out"),
        ("{{ m.content[20:] }}<|im_end|>", "content changes"),
        ("{{ m.content }}", "no end-of-turn token"),
    ],
)
def test_an_ambiguous_turn_is_refused_unless_it_carries_no_weight(assistant_turn, reason, smollm2_tokenizer):
    text = (
        "{% for m in messages %}{% if m.role == 'user' or loop.last %}:{{ m.content }}<|im_end|>{% else %}:"
        + assistant_turn
        + "{% endif %}"
    )
    template = template_of(text + "{% endfor %}{% if add_generation_prompt %}:{% endif %}", smollm2_tokenizer)
    messages = [user("q one"), assistant("the answer, long enough to cut"), user("q two"), assistant("last")]
    with pytest.raises(TemplateError, match=reason):
        render(conversation(*messages), template, smollm2_tokenizer)
    if reason != "content changes":  # where the row's texts lie is not known then, so nothing keeps its control tokens apart
        assert supervised(render(conversation(*messages), template, smollm2_tokenizer, train_on="last"), smollm2_tokenizer) == [
            "last<|im_end|>"
        ]
        messages[1] = assistant("the answer, long enough to cut", weight=0)
        assert supervised(render(conversation(*messages), template, smollm2_tokenizer), smollm2_tokenizer) == ["last<|im_end|>"]


def test_a_turn_with_another_message_inside_is_refused(smollm2_tokenizer):
    tokenizer = with_tokens(smollm2_tokenizer, STOCK["gemma4"])
    template = template_of(STOCK["gemma4"], tokenizer)  # writes a tool's result before the text of the turn that called it
    row = conversation(TOOLS.messages[0], assistant("Let me look.", tool_calls=(CALL,)), *TOOLS.messages[2:], tools=(TOOL,))
    with pytest.raises(TemplateError, match="another message inside turn 1"):
        render(row, template, tokenizer)
    assert supervised(render(row, template, tokenizer, train_on="last"), tokenizer) == ["It is sunny.<turn|>"]


def test_tools_that_the_template_does_not_write_are_refused(smollm2_tokenizer, smollm2_template):
    with pytest.raises(TemplateError, match="does not write the row's tools"):
        render(conversation(user("q"), assistant("a"), tools=(TOOL,)), smollm2_template, smollm2_tokenizer)


def test_a_token_that_mixes_a_question_with_an_answer_is_refused_or_split(smollm2_tokenizer):
    text = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
    template = template_of(text, smollm2_tokenizer)
    row = conversation(user("hel"), assistant("lo"), user("hel"), assistant("lo"))
    assert smollm2_tokenizer.tokenize("hello") != [*smollm2_tokenizer.tokenize("hel"), *smollm2_tokenizer.tokenize("lo")]
    with pytest.raises(TemplateError, match="one token holds the end of a question"):
        render(row, template, smollm2_tokenizer)
    last = render(row, template, smollm2_tokenizer, train_on="last")
    assert supervised(last, smollm2_tokenizer) == ["lo<|im_end|>"]
    assert last.ids[: last.prompt_length].tolist() == encode_prompt(row.prompt(), template, smollm2_tokenizer).tolist()


def test_a_control_token_that_takes_the_answer_s_first_space_carries_no_loss(smollm2_tokenizer):
    own = copy.deepcopy(smollm2_tokenizer)
    own.add_special_tokens({"additional_special_tokens": [AddedToken("<|a|>", rstrip=True, special=True)]})
    template = template_of(NAMED_TEMPLATES["chatml"].text.replace("'<|im_start|>' + message['role'] + '\\n'", "'<|a|>'"), own)
    template.text = template.text.replace("<|im_start|>assistant\\n", "<|a|>")
    rendered = render(conversation(user("q"), assistant("  one"), user("q"), assistant("  two")), template, own)
    opening = own.convert_tokens_to_ids("<|a|>")
    assert not rendered.weights[rendered.ids == opening].any()
    assert supervised(rendered, own) == ["one<|im_end|>", "two<|im_end|>"]


def test_a_row_that_fails_leaves_the_others_and_names_its_place(smollm2_tokenizer):
    tokenizer = with_tokens(smollm2_tokenizer, STOCK["gemma"])
    template = template_of(STOCK["gemma"], tokenizer)
    fine = conversation(user("q"), assistant("a"))
    results = list(render_records([fine, conversation(user("q"), user("q"), assistant("a")), fine], template, tokenizer))
    assert [type(result) for result in results] == [Rendered, TemplateError, Rendered]
    assert results[1].where.startswith("rows.jsonl:7 (r")
    assert "must alternate" in results[1].what


def test_many_rows_give_what_each_gives_alone(smollm2_tokenizer, smollm2_template):
    rows = [conversation(user(f"q {number}"), assistant(f"a {number}" * (number % 5 + 1))) for number in range(600)]
    together = list(render_records(iter(rows), smollm2_template, smollm2_tokenizer))
    for number in (0, 255, 256, 599):
        alone = render(rows[number], smollm2_template, smollm2_tokenizer)
        assert alone.ids.tolist() == together[number].ids.tolist()
        assert alone.weights.tolist() == together[number].weights.tolist()
    assert len(together) == 600


def test_a_base_model_s_named_template_is_rendered_with_its_new_tokens(smollm2_tokenizer):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocabulary = {token: number for number, token in enumerate(["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend.model = models.BPE(vocabulary, [])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    template = load_template(tokenizer, SimpleNamespace(chat_template="chatml"))
    tokenizer.add_special_tokens({"additional_special_tokens": list(template.new_tokens)})
    rendered = render(TURNS, template, tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert rendered.weights[rendered.ids == end].tolist() == [0, 1, 0, 1, 0, 1]
    assert stop_tokens(template, tokenizer) == sorted([tokenizer.eos_token_id, end])


def test_the_stop_tokens_are_those_a_turn_ends_with(smollm2_tokenizer):
    for name, expected in {
        "llama3_1": {"<|eot_id|>"},
        "phi3": {"<|end|>"},
        "gptoss": {"<|return|>", "<|call|>"},  # and not <|end|>, which ends the reasoning
        "glm4moe": {"<|user|>", "<|observation|>"},
        "cohere2": {"<|END_OF_TURN_TOKEN|>"},
        "gemma4": {"<turn|>", "<|tool_response>"},
    }.items():
        tokenizer = with_tokens(smollm2_tokenizer, STOCK[name])
        stops = stop_tokens(template_of(STOCK[name], tokenizer), tokenizer)
        assert set(tokenizer.convert_ids_to_tokens(stops)) == expected | {"<|im_end|>"}  # the tokenizer's own end of sequence


def test_a_conversation_without_an_answer_carries_no_loss(smollm2_tokenizer, smollm2_template):
    rendered = render(conversation(user("q")), smollm2_template, smollm2_tokenizer)
    assert not rendered.weights.any()
    assert rendered.prompt_length == len(rendered.ids)


def test_a_tokenizer_without_offsets_is_refused():
    slow = type("SlowTokenizer", (), {"is_fast": False})()
    with pytest.raises(ModelError, match="SlowTokenizer"):
        next(render_records([TURNS], ChatTemplate("", {}, ""), slow))


def test_the_terminal_sees_what_carries_loss_in_green_and_control_tokens_in_brackets(smollm2_tokenizer, smollm2_template):
    row = conversation(user("hello there"), assistant("one two", weight=0.5), user("x"), assistant("three"))
    shown = colourise(render(row, smollm2_template, smollm2_tokenizer), smollm2_tokenizer)
    assert shown.plain == re.sub(r"<\|im_\w+\|>", r"[\g<0>]", smollm2_template.render(row.to_hf()))
    styles = {shown.plain[span.start : span.end]: span.style for span in shown.spans}
    assert styles["one two"] == "rgb(0,175,0)"
    assert styles["three"] == "rgb(0,255,0)"
    assert styles["user\nhello there"] == "dim"
