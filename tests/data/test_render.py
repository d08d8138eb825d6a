"""Rendering: what carries loss, exactly, for every stock template."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from tests.data.rendering import (
    HERE,
    STOCK,
    TOOLS,
    TURNS,
    assistant,
    conversation,
    supervised,
    template_of,
    user,
    with_tokens,
)
from tokenizers import processors

from tunesmith.data.records import make_document
from tunesmith.data.render import Rendered, encode_prompt, render
from tunesmith.data.template import NAMED_TEMPLATES
from tunesmith.errors import TemplateError

REASONING = conversation(user("q one"), assistant("first", reasoning="r1"), user("q two"), assistant("final", reasoning="thought it"))


# What each stock template's model has to write itself, word for word; a row that is not there is refused, since the template leaves part of
# it out (no reasoning, no tools), raises, or opens the last answer in the prompt in another way than it writes it.
def answers(end, before=""):
    return [f"{before}answer {number}{end}" for number in ("one", "two", "three")]


IM, JSON_CALL = "<|im_end|>", '{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}'


XML_CALL = (
    "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n"
    "<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>"
)


QWEN2_TOOLS = [f"<tool_call>\n{JSON_CALL}\n</tool_call>{IM}", f"It is sunny.{IM}"]


LLAMA_TOOLS = ['{"name": "get_weather", "parameters": {"city": "Paris", "days": 2}}<|eot_id|>', "It is sunny.<|eot_id|>"]


GEMMA4_CALL = '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>,days:2}<tool_call|>'


GEMMA4_TOOLS = [f"{GEMMA4_CALL}<|tool_response>", "It is sunny.<turn|>"]


GEMMA4_REASONING = ["first<turn|>", "<|channel>thought\nthought it\n<channel|>final<turn|>"]


LFM_TOOLS = ["<|tool_call_start|>[get_weather(city='Paris', days=2)]<|tool_call_end|><|im_end|>", "It is sunny.<|im_end|>"]


LFM25 = {"turns": answers(IM), "reasoning": [f"first{IM}", f"<think>thought it</think>final{IM}"], "tools": LFM_TOOLS}


THINK35 = {
    "turns": [f"answer one{IM}", f"answer two{IM}", f"\n</think>\n\nanswer three{IM}"],
    "reasoning": [f"first{IM}", f"thought it\n</think>\n\nfinal{IM}"],
    "tools": [f"\n</think>\n\n{XML_CALL}{IM}", f"\n</think>\n\nIt is sunny.{IM}"],
}


NEMOTRON = {"reasoning": [f"first{IM}", f"thought it\n</think>\nfinal{IM}"]}


FINAL, ANALYSIS = "<|channel|>final<|message|>", "<|channel|>analysis<|message|>"


GLM_CALL = (
    "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n"
)


ATEM = (
    '<atem:invoke name="get_weather">\n<atem:parameter name="city">Paris</atem:parameter>\n<atem:parameter name="days">2</atem:parameter>\n'
)


GOLDEN = {
    "cohere": {"turns": answers("<|END_OF_TURN_TOKEN|>")},
    "cohere2": {"turns": answers("<|END_RESPONSE|><|END_OF_TURN_TOKEN|>")},
    "deepseek_r1_distill": {},
    "deepseekv3": {},
    "diffusion_gemma": {
        "turns": answers("<turn|>"),
        "reasoning": GEMMA4_REASONING,
        "tools": [f"{GEMMA4_CALL}<|tool_response>", "<|turn>model\nIt is sunny.<turn|>"],
    },
    "gemma": {"turns": answers("<end_of_turn>")},
    "gemma3": {"turns": answers("<end_of_turn>")},
    "gemma4": {"turns": answers("<turn|>"), "tools": GEMMA4_TOOLS},
    "gemma4_v2": {"turns": answers("<turn|>"), "tools": [f"{GEMMA4_CALL}<turn|>", "It is sunny.<turn|>"]},
    "gemma4_v3": {"turns": answers("<turn|>"), "tools": GEMMA4_TOOLS},
    "gemma4_v4": {"turns": answers("<turn|>"), "tools": GEMMA4_TOOLS},
    "gemma4_v5": {"turns": answers("<turn|>"), "reasoning": GEMMA4_REASONING, "tools": GEMMA4_TOOLS},
    "glm4moe": {  # its model ends a turn by naming who speaks next; nothing follows the last turn, so the end of sequence is appended
        "turns": [f"\n<think></think>\nanswer {number}{end}" for number, end in (("one", "<|user|>"), ("two", "<|user|>"), ("three", IM))],
        "reasoning": ["\n<think></think>\nfirst<|user|>", f"\n<think>thought it</think>\nfinal{IM}"],
        "tools": [f"\n<think></think>\n{GLM_CALL}</tool_call><|observation|>", f"\n<think></think>\nIt is sunny.{IM}"],
    },
    "gptoss": {
        "turns": [f"{FINAL}answer one<|end|>", f"{FINAL}answer two<|end|>", f"{FINAL}answer three<|return|>"],
        "reasoning": [f"{FINAL}first<|end|>", f"{ANALYSIS}thought it<|end|><|start|>assistant{FINAL}final<|return|>"],
        "tools": [
            ' to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Paris", "days": 2}<|call|>',
            f"{FINAL}It is sunny.<|return|>",
        ],
    },
    "idefics3": {"turns": answers("<end_of_utterance>", " ")},
    "lfm2": {"turns": answers(IM)},
    "lfm2_2_5": LFM25,
    "lfm2_2_5_v2": LFM25,
    "lfm2_2_5_vl": LFM25,
    "lfm2_v2": {"turns": answers(IM), "tools": LFM_TOOLS},
    "llama3": {"turns": answers("<|eot_id|>")},
    "llama3_1": {"turns": answers("<|eot_id|>"), "tools": LLAMA_TOOLS},
    "llama3_2": {"turns": answers("<|eot_id|>"), "tools": LLAMA_TOOLS},
    "llava_next": {"turns": answers("</s>", " ")},
    "muse_glimmer": {
        "turns": answers("<|eot|>", " to=user<|message|>"),
        "reasoning": [
            f" to=self<|message|>{thought}<|eom|><|start|>assistant to=user<|message|>{text}<|eot|>"
            for thought, text in (("r1", "first"), ("thought it", "final"))
        ],
        "tools": [
            f" to=get_weather<|message|><atem:function_calls>\n{ATEM}</atem:invoke>\n</atem:function_calls><|eot|>",
            " to=user<|message|>It is sunny.<|eot|>",
        ],
    },
    "nemotron_3_5_lightning": {"reasoning": [f"first{IM}", f"thought it</think>final{IM}"]},
    "nemotron_3_nano": NEMOTRON,
    "nemotron_3_super": NEMOTRON,
    "nemotron_3_ultra": {"reasoning": [f"first{IM}", f"thought it</think>final{IM}"]},
    "phi3": {"turns": answers("<|end|>")},
    "phi3_5": {"turns": answers("<|end|>")},
    "qwen2_5": {"turns": answers(IM), "tools": QWEN2_TOOLS},
    "qwen2_5_vl": {"turns": answers(IM)},
    "qwen3": {
        "turns": [f"answer one{IM}", f"answer two{IM}", f"<think>\n\n</think>\n\nanswer three{IM}"],
        "reasoning": [f"first{IM}", f"<think>\nthought it\n</think>\n\nfinal{IM}"],
        "tools": [QWEN2_TOOLS[0], f"<think>\n\n</think>\n\nIt is sunny.{IM}"],
    },
    "qwen3_5_nothink": {"turns": answers(IM), "tools": [f"{XML_CALL}{IM}", f"It is sunny.{IM}"]},
    "qwen3_5_think": THINK35,
    "qwen3_6": THINK35,
    "qwen3_8": {
        "turns": answers(IM, "\n</think>\n\n"),
        "reasoning": [f"r1\n</think>\n\nfirst{IM}", f"thought it\n</think>\n\nfinal{IM}"],
        "tools": THINK35["tools"],
    },
    "qwen3_instruct_2507": {"turns": answers(IM), "tools": QWEN2_TOOLS},
    "qwen3_vl": {"turns": answers(IM), "tools": QWEN2_TOOLS},
    "smolvlm": {"turns": answers("<end_of_utterance>", " ")},
}


ROWS = {"turns": TURNS, "reasoning": REASONING, "tools": TOOLS}


def test_the_opening_of_a_tool_call_carries_loss_though_the_prompt_opens_a_turn_otherwise(smollm2_tokenizer):
    text = STOCK["deepseekv3_training"]  # asks with <think>, and writes a call without it
    tokenizer = with_tokens(smollm2_tokenizer, text)
    assert supervised(render(TOOLS, template_of(text, tokenizer), tokenizer), tokenizer)[0] == (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
        '{"city": "Paris", "days": 2}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>'
    )


def test_a_template_that_asks_in_another_way_than_it_writes_is_refused_in_those_words(smollm2_tokenizer):
    tokenizer = with_tokens(smollm2_tokenizer, STOCK["deepseekv3"])
    with pytest.raises(TemplateError, match=r"asks for the last answer in another way than it writes it: the prompt ends .*think"):
        render(TURNS, template_of(STOCK["deepseekv3"], tokenizer), tokenizer)


def test_every_stock_template_has_its_golden_text():
    assert {name for name in STOCK if not name.endswith("_training")} == GOLDEN.keys()


@pytest.mark.parametrize("name", GOLDEN)
def test_what_carries_loss_is_the_answer_and_its_end_of_turn_or_the_row_is_refused(name, smollm2_tokenizer):
    tokenizer = with_tokens(smollm2_tokenizer, STOCK[name])
    template = template_of(STOCK[name], tokenizer)
    for kind, row in ROWS.items():
        if kind not in GOLDEN[name]:
            with pytest.raises(TemplateError) as caught:
                render(row, template, tokenizer)
            assert "rows.jsonl:7" in caught.value.where
            assert caught.value.mend
            continue
        rendered = render(row, template, tokenizer)
        assert supervised(rendered, tokenizer) == GOLDEN[name][kind]
        last = render(row, template, tokenizer, train_on="last")
        assert supervised(last, tokenizer) == GOLDEN[name][kind][-1:]
        assert rendered.ids.dtype == np.int32
        assert rendered.weights.dtype == np.float32
        assert rendered.weights[0] == 0
        prompt = encode_prompt(row.prompt(), template, tokenizer, tools=row.tools)
        assert rendered.ids[: rendered.prompt_length].tolist() == prompt.tolist()
        assert rendered.weights[rendered.prompt_length] > 0


# templates patched by the reference library to mark exactly what the model writes, and the newline after it
SAME_MARKS = ["cohere", "cohere2", "diffusion_gemma", "gemma", "gemma3", "glm4moe", "lfm2", "lfm2_v2", "llama3", "qwen3", "qwen3_vl"]


@pytest.mark.parametrize("name", SAME_MARKS)
def test_what_carries_loss_agrees_with_the_generation_marks_of_the_reference_library(name, smollm2_tokenizer):
    text = STOCK[f"{name}_training"]
    tokenizer = with_tokens(smollm2_tokenizer, text)
    ours = render(TURNS, template_of(text, tokenizer), tokenizer)
    reference = tokenizer.apply_chat_template(TURNS.to_hf(), return_assistant_tokens_mask=True, return_dict=True)
    theirs = Rendered(np.array(reference["input_ids"]), np.array(reference["assistant_masks"], dtype=np.float32), 0)
    assert supervised(ours, tokenizer) == [run.removesuffix("\n") for run in supervised(theirs, tokenizer)]


def test_the_embedded_model_s_conversation_has_only_the_tokens_its_template_writes(smollm2_tokenizer, smollm2_template):
    rendered = render(TURNS, smollm2_template, smollm2_tokenizer)
    text = smollm2_template.render(TURNS.to_hf())
    assert smollm2_tokenizer.decode(rendered.ids) == text
    bos = smollm2_tokenizer.bos_token_id
    assert rendered.ids[0] == bos  # <|im_start|>, which is this tokenizer's BOS
    assert int((rendered.ids == bos).sum()) == text.count("<|im_start|>")
    prompt = encode_prompt(TURNS.prompt(), smollm2_template, smollm2_tokenizer)
    assert smollm2_tokenizer.decode(prompt) == smollm2_template.render(TURNS.to_hf()[:-1], add_generation_prompt=True)


def test_a_tokenizer_that_adds_bos_does_not_double_the_template_s(smollm2_tokenizer):
    own = copy.deepcopy(smollm2_tokenizer)
    own.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    template = template_of("{{ bos_token }}" + NAMED_TEMPLATES["chatml"].text.replace("<|im_start|>", "<file_sep>"), own)
    assert own("x").input_ids[0] == own.bos_token_id
    for ids in (render(TURNS, template, own).ids, encode_prompt(TURNS.prompt(), template, own)):
        assert int((ids == own.bos_token_id).sum()) == 1


def test_a_document_has_the_bos_and_the_one_end_that_its_tokenizer_gives_plain_text(smollm2_tokenizer):
    own = copy.deepcopy(smollm2_tokenizer)
    own.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A <|im_end|>", special_tokens=[("<|endoftext|>", 0), ("<|im_end|>", 2)]
    )
    for text in ("Once upon a time.", "<|endoftext|>Once<|im_end|>"):
        rendered = render(make_document(text, HERE), None, own)
        assert own.decode(rendered.ids) == f"<|endoftext|>{text}<|im_end|>"
        assert [int((rendered.ids == special).sum()) for special in (0, 2)] == [1, 1]
        assert rendered.weights.tolist() == [0.0] + [1.0] * (len(rendered.ids) - 1)
    assert rendered.ids[0] == 0
    assert render(make_document("Once upon a time.", HERE), None, own).ids.tolist() == own("Once upon a time.").input_ids


def test_a_tokenizer_that_trims_its_offsets_loses_no_space(smollm2_tokenizer, smollm2_template):
    own = copy.deepcopy(smollm2_tokenizer)
    own.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    row = conversation(user("q  "), assistant("one \n\n"), user(" q"), assistant("two  "))
    assert supervised(render(row, smollm2_template, own), own) == ["one \n\n<|im_end|>", "two  <|im_end|>"]


def test_the_end_of_turn_carries_loss_though_it_is_the_padding_token_too(smollm2_tokenizer, smollm2_template):
    assert smollm2_tokenizer.pad_token_id == smollm2_tokenizer.eos_token_id
    rendered = render(TURNS, smollm2_template, smollm2_tokenizer)
    at_end = np.flatnonzero(rendered.ids == smollm2_tokenizer.eos_token_id)
    assert rendered.weights[at_end].tolist() == [0, 0, 1, 0, 1, 0, 1]  # system, user, assistant, user, assistant, user, assistant
    assert rendered.weights[at_end[-1] + 1 :].tolist() == [0]  # the newline after it


def test_a_message_s_weight_wins_over_train_on_and_scales(smollm2_tokenizer, smollm2_template):
    row = conversation(
        user("a"),
        assistant("one", weight=0.25),
        user("b"),
        assistant("two", weight=0),
        user("c"),
        assistant("three"),
        user("d"),
        assistant("4"),
    )
    everything = render(row, smollm2_template, smollm2_tokenizer)
    assert supervised(everything, smollm2_tokenizer) == ["one<|im_end|>", "three<|im_end|>", "4<|im_end|>"]
    assert sorted(set(everything.weights.tolist())) == [0, 0.25, 1]
    last = render(row, smollm2_template, smollm2_tokenizer, train_on="last")
    assert supervised(last, smollm2_tokenizer) == ["one<|im_end|>", "4<|im_end|>"]
    with pytest.raises(TemplateError, match="only assistant turns carry loss"):
        render(conversation(user("a", weight=1.0), assistant("b")), smollm2_template, smollm2_tokenizer)
    for weight in (-1.0, float("nan"), float("inf")):
        broken = conversation(user("a"), assistant("b"))
        broken = type(broken)((broken.messages[0], assistant("b", weight=weight)), "r0", HERE)
        with pytest.raises(TemplateError, match="weight"):
            render(broken, smollm2_template, smollm2_tokenizer)


def test_a_document_carries_loss_on_every_token_but_the_first_and_ends_with_the_end_of_sequence(smollm2_tokenizer):
    rendered = render(make_document("Once upon a <|im_end|> time.", HERE), None, smollm2_tokenizer)
    assert smollm2_tokenizer.decode(rendered.ids) == "Once upon a <|im_end|> time.<|im_end|>"
    assert int((rendered.ids == smollm2_tokenizer.eos_token_id).sum()) == 1
    assert rendered.weights.tolist() == [0.0] + [1.0] * (len(rendered.ids) - 1)
    assert rendered.prompt_length == 0
    assert rendered.ids[0] == smollm2_tokenizer.encode("Once").pop(0), "this tokenizer adds nothing"
    with pytest.raises(TemplateError, match="needs a chat template"):
        render(TURNS, None, smollm2_tokenizer)
