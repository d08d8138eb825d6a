"""What the tests of rendering share: conversations, templates, and reading back what carries loss."""

from __future__ import annotations

import copy
import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from tunesmith.data.records import Message, Source, make_conversation
from tunesmith.data.template import load_template

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


def fuzz(random_source, pieces):
    return "".join(random_source.choice(pieces) for _ in range(random_source.randint(1, 8)))
