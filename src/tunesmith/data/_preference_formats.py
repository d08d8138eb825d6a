"""From a row's values to a preference record: TRL's, OpenAI's and Anthropic's (HH) pairs, rankings, unpaired answers, prompts.

A prompt is text or messages, and so is an answer. Where `chosen` and `rejected` are whole dialogues, what they have in common is the
prompt; HH's are text, whose turns begin with "\\n\\nHuman:" and "\\n\\nAssistant:". READERS is what formats.py adds to its own.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ._values import Notes, RowRefused, is_messages, list_of, message_of, object_of, short, text_of, tools_of
from .preference import Preference, PreferencePair, PromptOnly, Ranking, Unpaired, make_pair, make_prompt, make_ranking, make_unpaired
from .records import Message, Source, canonical

_TURN = re.compile(r"\n\n(Human|Assistant):")
MOST_MARGIN = 1e6  # a margin is compared with differences of rewards; float32 overflows far beyond
_ROLES = {"Human": "user", "Assistant": "assistant"}


def _pair(row: dict[str, Any], source: Source, system: str | None, notes: Notes) -> PreferencePair:
    tools = tools_of(row)
    if row.get("preferred_output") is not None:
        given = object_of(row["input"], "input")
        prompt = [message_of(one, f"input.messages[{i}]", notes) for i, one in enumerate(_given_messages(given))]
        tools = tools_of(given) or tools
        chosen, rejected = (_answer(row[key], key, notes) for key in ("preferred_output", "non_preferred_output"))
    else:
        own = _prompt(row["prompt"], notes) if row.get("prompt") is not None else None
        chosen, rejected = (_dialogue(row[key], key, notes) for key in ("chosen", "rejected"))
        prompt = own or []
        if own is None or chosen[0].role in ("user", "system") or rejected[0].role in ("user", "system"):
            prompt, chosen, rejected = _common(own, chosen, rejected, whole=not is_messages(row["chosen"]))
    prompt = _checked_prompt(prompt, row)
    chosen, rejected = _checked_answer(chosen, "chosen", notes), _checked_answer(rejected, "rejected", notes)
    if _key(chosen) == _key(rejected):
        raise RowRefused("chosen is equal to rejected")
    _note_weights(prompt, notes)
    return make_pair(prompt, chosen, rejected, source, margin=_margin(row.get("margin"), source), tools=tools, system=system)


def _ranking(row: dict[str, Any], source: Source, system: str | None, notes: Notes) -> Ranking:
    prompt = _checked_prompt(_prompt(row["prompt"], notes), row)
    given = list_of(row["completions"], "completions")
    answers = [_checked_answer(_answer(one, f"completions[{i}]", notes), f"completions[{i}]", notes) for i, one in enumerate(given)]
    if len(answers) < 2:
        raise RowRefused(f"a ranking of {len(answers)} answer{'s' if len(answers) != 1 else ''}; at least 2 can be compared")
    if len({_key(answer) for answer in answers}) < len(answers):
        raise RowRefused("two completions are equal")
    places = _places(row, len(answers))
    _note_weights(prompt, notes)
    return make_ranking(prompt, [answers[i] for i in places], source, tools=tools_of(row), system=system)


def _unpaired(row: dict[str, Any], source: Source, system: str | None, notes: Notes) -> Unpaired:
    prompt = _checked_prompt(_prompt(row["prompt"], notes), row)
    completion = _checked_answer(_answer(row["completion"], "completion", notes), "completion", notes)
    label = _label(row["label"], source, notes)
    _note_weights(prompt, notes)
    return make_unpaired(prompt, completion, label, source, tools=tools_of(row), system=system)


def _prompt_only(row: dict[str, Any], source: Source, system: str | None, notes: Notes) -> PromptOnly:
    prompt = _checked_prompt(_prompt(row["prompt"], notes), row)
    if prompt[-1].role == "assistant":
        raise RowRefused("the prompt ends with the assistant's turn, so nothing is asked")
    columns = {key: value for key, value in row.items() if key not in ("prompt", "tools", "system")}
    return make_prompt(prompt, columns, source, tools=tools_of(row), system=system)


READERS: dict[str, Callable[[dict[str, Any], Source, str | None, Notes], Preference]] = {
    "preference": _pair,
    "ranking": _ranking,
    "unpaired": _unpaired,
    "prompt": _prompt_only,
}


def _given_messages(given: dict[str, Any]) -> list[Any]:
    if given.get("messages") is None:
        raise RowRefused("missing key `messages` in input")
    return list_of(given["messages"], "input.messages")


def _prompt(value: Any, notes: Notes) -> list[Message]:
    """A prompt as messages: those given, an HH dialogue that ends where the assistant is to speak, or one user turn."""
    if is_messages(value):
        return [message_of(one, f"prompt[{i}]", notes) for i, one in enumerate(value)]
    text = text_of(value, "prompt")
    turns = hh_turns(text)
    if turns and turns[-1] == Message("assistant", ""):
        notes["prompts that end with `Assistant:` are read as dialogues of `Human:` and `Assistant:` turns"] += 1
        return turns[:-1]
    return [Message("user", text)]


def _answer(value: Any, where: str, notes: Notes) -> list[Message]:
    if is_messages(value):
        return [message_of(one, f"{where}[{i}]", notes) for i, one in enumerate(value)]
    if value == []:
        raise RowRefused(f"empty answer: {where} has no messages")
    if isinstance(value, dict) and "role" in value:
        return [message_of(value, where, notes)]
    return [Message("assistant", text_of(value, where))]


def _dialogue(value: Any, where: str, notes: Notes) -> list[Message]:
    """An answer, or where the text is an HH dialogue, all of its turns."""
    turns = hh_turns(value) if isinstance(value, str) else []
    if turns and turns[0].role == "user":
        return turns
    return _answer(value, where, notes)


def hh_turns(text: str) -> list[Message]:
    """The turns of a dialogue as Anthropic's HH data write it; none where the text does not begin with one."""
    parts = _TURN.split(text)
    if len(parts) < 3 or parts[0].strip():
        return []
    return [Message(_ROLES[who], said.strip()) for who, said in zip(parts[1::2], parts[2::2], strict=True)]


def _common(
    prompt: list[Message] | None, chosen: list[Message], rejected: list[Message], *, whole: bool
) -> tuple[list[Message], list[Message], list[Message]]:
    """(prompt, chosen answer, rejected answer) of two whole dialogues. prompt: the row's own, which must be how they begin.

    whole: everything before the last turn must be shared, as HH means it; else the messages in common are the prompt.
    """
    if _key(chosen) == _key(rejected):
        raise RowRefused("chosen is equal to rejected")
    for turns, name in ((chosen, "chosen"), (rejected, "rejected")):
        if turns[0].role not in ("user", "system"):
            lacks = "no prompt: the row has no key `prompt`" if prompt is None else "the other is a whole dialogue"
            raise RowRefused(f"{lacks}, and {name} is an answer alone")
        if turns[-1].role != "assistant":
            raise RowRefused(f"the last turn of {name} is not the assistant's but the {turns[-1].role}'s")
    shared = next(
        (i for i, (one, other) in enumerate(zip(chosen, rejected, strict=False)) if one != other), min(len(chosen), len(rejected))
    )
    ends = (len(chosen) - 1, len(rejected) - 1) if whole else (shared, shared)
    if shared < max(ends) or shared > min(len(chosen), len(rejected)) - 1:
        raise RowRefused("a pair whose prompts differ: chosen and rejected do not share all turns before the last answer")
    begin, answers = chosen[: ends[0]], (chosen[ends[0] :], rejected[ends[1] :])
    if any(message.role not in ("assistant", "tool") for answer in answers for message in answer):
        raise RowRefused("a pair whose prompts differ: chosen and rejected differ before the last question")
    if prompt is not None:
        own = [message for message in prompt if message.role != "system"]
        if own != [message for message in begin if message.role != "system"]:
            raise RowRefused("a pair whose prompts differ: the dialogues do not begin with the row's `prompt`")
        systems = [[message for message in messages if message.role == "system"] for messages in (prompt, begin)]
        if all(systems) and systems[0] != systems[1]:
            raise RowRefused("a pair whose prompts differ: the dialogues have another system message than the row's `prompt`")
        begin = prompt if len(prompt) > len(begin) else begin
    return begin, *answers


def _checked_prompt(prompt: Sequence[Message], row: dict[str, Any]) -> list[Message]:
    lead = [Message("system", text_of(row["system"], "system"))] if row.get("system") else []
    if all(message.role == "assistant" for message in prompt):
        raise RowRefused("nothing stands before the answer")
    for index, message in enumerate(prompt):
        if message.role in ("user", "assistant") and not message.content.strip() and not message.tool_calls:
            raise RowRefused(f"empty prompt (turn {index + 1} of {len(prompt)})")
    return [*lead, *prompt]


def _checked_answer(answer: Sequence[Message], where: str, notes: Notes) -> list[Message]:
    """Assistant turns, and results of tools between them; an answer that is compared is taken whole, so its turns have no weights."""
    if answer[0].role != "assistant":
        raise RowRefused(f"{where} begins with a {answer[0].role} turn, not with the assistant's")
    if answer[-1].role != "assistant":
        raise RowRefused(f"the last turn of {where} is not the assistant's but the {answer[-1].role}'s")
    for message in answer:
        if message.role not in ("assistant", "tool"):
            raise RowRefused(f"{where} holds a {message.role} turn; an answer is the assistant's turns and what tools return")
        if message.role == "assistant" and not message.content.strip() and not message.tool_calls:
            raise RowRefused(f"empty answer: {where}")
        if message.weight not in (None, 1.0):
            raise RowRefused(f"{where} has a turn of weight {message.weight:g}; an answer that is compared counts whole")
    return [replace(message, weight=None) for message in answer]


def _key(messages: Sequence[Message]) -> str:
    """Equal for answers that differ in nothing but the whitespace around them."""
    return canonical([{**message.as_given(), "content": message.content.strip()} for message in messages])


def _places(row: dict[str, Any], count: int) -> list[int]:
    """The positions of the answers, best first, by ranks (1 is best) or scores (the highest is best), or as they stand."""
    orders: list[list[int]] = []
    for name, sign in (("ranks", 1), ("scores", -1)):
        if row.get(name) is None:
            continue
        values = [_number(value, f"{name}[{i}]") for i, value in enumerate(list_of(row[name], name))]
        if len(values) != count:
            raise RowRefused(f"{len(values)} {name} for {count} completions")
        if twice := [value for value, times in Counter(values).items() if times > 1]:
            raise RowRefused(f"{name} hold a tie ({short(twice[0])}): which answer is better is not said")
        orders.append(sorted(range(count), key=lambda i: sign * values[i]))
    if len(orders) == 2 and orders[0] != orders[1]:
        raise RowRefused("ranks and scores give different orders")
    return orders[0] if orders else list(range(count))


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RowRefused(f"{where} is {short(value)}, not a number")
    return value


def _label(value: Any, source: Source, notes: Notes) -> bool:
    """A truth value, also as the whole number 1 or 0; in CSV by what is written."""
    if isinstance(value, str) and _is_csv(source):
        value = {"true": True, "false": False, "1": 1, "0": 0}.get(value.strip().lower(), value)
    if type(value) is int and value in (0, 1):
        notes["labels 1 and 0 are read as true and false"] += 1
        return value == 1
    if not isinstance(value, bool):
        raise RowRefused(f"label is {short(value)}, not true or false")
    return value


def _margin(value: Any, source: Source) -> float | None:
    if value is None or (value == "" and _is_csv(source)):
        return None
    if isinstance(value, str) and _is_csv(source):
        try:
            value = float(value)
        except ValueError as error:
            raise RowRefused(f"margin is {short(value)}, not a number") from error
    margin = float(_number(value, "margin"))
    if margin < 0:
        raise RowRefused(f"margin is {margin:g}, below 0: the rejected answer would be the better one")
    if margin > MOST_MARGIN:
        raise RowRefused(f"margin is {margin:g}; at most {MOST_MARGIN:g} is read")
    return margin


def _is_csv(source: Source) -> bool:
    """A CSV file holds nothing but text, so there a number or a truth value is one by what it says."""
    return source.path.lower().endswith((".csv", ".tsv"))


def _note_weights(prompt: Sequence[Message], notes: Notes) -> None:
    if any(message.weight for message in prompt):
        notes["weights of turns in the prompt are not used: only the answers carry loss"] += 1
