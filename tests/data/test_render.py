"""Rendering: exact loss weights, prompts that are the beginning of what is trained on, and no control token from a row's text."""

from __future__ import annotations

import copy
import importlib.util
import json
import random
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tunesmith.data.records import Message, Source, make_conversation, make_document
from tunesmith.data.render import Rendered, colourise, encode_prompt, encode_prompts, render, render_records, stop_tokens
from tunesmith.data.template import NAMED_TEMPLATES, ChatTemplate, load_template
from tunesmith.errors import ModelError, TemplateError

HERE = Source("rows.jsonl", 7)
FOLDER = Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"
STOCK = {path.stem: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.jinja"))}
CONTROL = re.compile(r"<\|[^<>|\s]+\|>|<｜[^<>]+｜>|<(?:start|end)_of_turn>|<\|\w+>|<\w+\|>|<\|\"\|>|<end_of_utterance>|</s>")
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "Where."}}, "required": ["city"]},
    },
}
CALL = {"type": "function", "id": "call00001", "function": {"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}}


def user(text, **more):
    return Message("user", text, **more)


def assistant(text, **more):
    return Message("assistant", text, **more)


def conversation(*messages, tools=None):
    return make_conversation(messages, HERE, tools=tools)


TURNS = conversation(user("q one"), assistant("answer one"), user("q two"), assistant("answer two"), user("q 3"), assistant("answer three"))
REASONING = conversation(user("q one"), assistant("first", reasoning="r1"), user("q two"), assistant("final", reasoning="thought it"))
TOOLS = conversation(
    user("weather?"),
    assistant("", tool_calls=(CALL,)),
    Message("tool", "sunny", tool_call_id="call00001", name="get_weather"),
    assistant("It is sunny."),
    tools=(TOOL,),
)


def template_of(text, tokenizer):
    tokenizer.chat_template = text
    return load_template(tokenizer, SimpleNamespace(chat_template=None))


def with_tokens(tokenizer, text):
    """A copy of the tokenizer that has the template's control tokens, as the template's own model has."""
    own = copy.deepcopy(tokenizer)
    own.add_special_tokens({"additional_special_tokens": list(dict.fromkeys(CONTROL.findall(text)))})
    return own


def supervised(rendered, tokenizer):
    """The decoded runs of tokens that carry loss."""
    runs, before = [], -2
    for position in np.flatnonzero(rendered.weights):
        if position != before + 1:
            runs.append([])
        runs[-1].append(int(rendered.ids[position]))
        before = position
    return [tokenizer.decode(run) for run in runs]


@pytest.fixture(scope="session")
def smollm2_template(smollm2_tokenizer):
    return load_template(smollm2_tokenizer, SimpleNamespace(chat_template=None))


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
    with pytest.raises(TemplateError, match="needs a chat template"):
        render(TURNS, None, smollm2_tokenizer)


def fuzz(random_source, pieces):
    return "".join(random_source.choice(pieces) for _ in range(random_source.randint(1, 8)))


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
        NAMED_TEMPLATES["chatml"].text.replace("assistant\\n", "assistant:").replace("+ '\\n' +", "+ ':' +", 1), smollm2_tokenizer
    )
    row = conversation(user("q"), assistant("::"))
    whole = smollm2_tokenizer(template.render(row.to_hf()), add_special_tokens=False).input_ids
    rendered = render(row, template, smollm2_tokenizer)
    prompt = encode_prompt(row.prompt(), template, smollm2_tokenizer)
    assert whole[: len(prompt)] != prompt.tolist()  # tokenised as a whole, the colon of the prompt runs into the answer
    assert rendered.ids[: len(prompt)].tolist() == prompt.tolist()
    assert supervised(rendered, smollm2_tokenizer) == ["::<|im_end|>"]


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
