"""Where a turn's loss begins and ends in a rendered conversation, and what a template's turns look like.

A `Layout` is read off a template once, from four small conversations that it renders: whether content must be a list of parts, and
which special token ends an assistant's turn (the last one that a turn has in common in the middle and at the end of a conversation).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..errors import TemplateError
from ._encode import Encoder
from ._marks import Field, Located, locate, mark
from .template import ChatTemplate, RenderJob

_TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks.",
        "parameters": {"type": "object", "properties": {"at": {"type": "string", "description": "What."}}, "required": ["at"]},
    },
}
_CALL = {"type": "function", "id": "call00001", "function": {"name": "look", "arguments": {"at": "b"}}}
_ASK, _ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
_CALLS = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
_RESULT = {"role": "tool", "content": "c", "name": "look", "tool_call_id": "call00001"}


class Layout(NamedTuple):
    """What a template does in every conversation.

    parts: content is given as a list of parts. close: the special token that ends a turn, by kind of turn ("content", "tool_calls"),
    None where the last turn and one in the middle end differently. stops: the special tokens a generation ends with. markup: bool[V],
    True at added tokens that are not special but that the template writes.
    """

    parts: bool
    close: dict[str, str | None]
    stops: tuple[str, ...]
    markup: np.ndarray


class Turn(NamedTuple):
    """The characters start:end of a text carry loss; appends_eos: the template ends the text without an end of turn, so the
    end-of-sequence token is appended and carries loss."""

    start: int
    end: int
    appends_eos: bool = False


def with_parts(messages: list[dict[str, Any]], layout: Layout) -> list[dict[str, Any]]:
    """The messages with content as a list of one text part, for templates that take only that."""
    if not layout.parts:
        return messages
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]


def layout_for(template: ChatTemplate, encoder: Encoder) -> Layout:
    """The template's layout with this tokenizer, found once. Raises TemplateError where the template has to be killed."""
    if template.sha256 not in encoder.layouts:
        encoder.layouts[template.sha256] = _find_layout(template, encoder)
    return encoder.layouts[template.sha256]


def _find_layout(template: ChatTemplate, encoder: Encoder) -> Layout:
    as_text: list[list[dict[str, Any]]] = [
        [_ASK, _ANSWER],
        [_ASK, _ANSWER, _ASK, _ANSWER],
        [_ASK, _CALLS],
        [_ASK, _CALLS, _RESULT, _ANSWER],
    ]
    as_parts = [[{**message, "content": [{"type": "text", "text": message["content"]}]} for message in one] for one in as_text]
    marked = [mark(messages) for messages in as_text + as_parts]
    tools = [None, None, [_TOOL], [_TOOL]] * 2
    texts = template.render_many([RenderJob(one.messages, tool) for one, tool in zip(marked, tools, strict=True)], patience=1)
    tails = [_tail(text, one) for text, one in zip(texts, marked, strict=True)]
    parts = tails[0] is None and tails[4] is not None
    found = tails[4:] if parts else tails[:4]
    close, stops = {}, {encoder.eos} if encoder.eos else set()
    for kind, at_end, in_middle in (("content", found[0], found[1]), ("tool_calls", found[2], found[3])):
        close[kind] = encoder.last_special(at_end[: _shared(at_end, in_middle)]) if at_end and in_middle else None
        tail = at_end if at_end and encoder.first_special(at_end) else in_middle
        first = encoder.first_special(tail) if tail else None
        if close[kind] or first:
            stops.add(close[kind] or tail[slice(*first)])
    sources = template.text + (template.tool_text or "")
    markup = [number for number, token in encoder.added.items() if number not in encoder.special and token in sources]
    return Layout(parts, close, tuple(sorted(stops)), encoder.mask(markup))


def _shared(one: str, other: str) -> int:
    """How many characters two texts have in common from the beginning."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _tail(text: str | TemplateError, marked: Any) -> str | None:
    """What follows the first assistant turn's last mark, up to the next message's; None where it was not written."""
    if isinstance(text, TemplateError):
        return None
    located = locate(text, marked)
    own = [place for place, one in enumerate(located.marks) if marked.fields[one.field].message == 1]
    if not own:
        return None
    stop = located.marks[own[-1] + 1].position if own[-1] + 1 < len(located.marks) else len(located.text)
    return located.text[located.marks[own[-1]].position : stop]


def find_turn(
    index: int,
    messages: Sequence[dict[str, Any]],
    located: Located,
    opening: Located | None,
    fields: Sequence[Field],
    layout: Layout,
    encoder: Encoder,
) -> Turn:
    """The span of message `index` that carries loss. opening: the marked prompt that asks for it, None where it cannot be rendered.

    Raises TemplateError where the template leaves the turn out, writes it more than once, or mixes it with another message, and
    where no end of turn follows.
    """
    own = [place for place, one in enumerate(located.marks) if fields[one.field].message == index]
    _check_written(index, messages, [located.marks[place].field for place in own], fields)
    if own != list(range(own[0], own[-1] + 1)):
        raise TemplateError(f"the template writes another message inside turn {index}", mend=_mend(index))
    marks = located.marks
    start = _start(located, own[0], opening, fields, encoder)
    if start is None:
        raise TemplateError(f"the template cuts off the beginning of turn {index}", mend=_mend(index))
    after = marks[own[-1]].position
    limit = marks[own[-1] + 1].position if own[-1] + 1 < len(marks) else len(located.text)
    rest = located.text[after:limit]
    close = layout.close["tool_calls" if messages[index].get("tool_calls") else "content"]
    if close and (at := rest.find(close)) >= 0:
        return Turn(start, after + at + len(close))
    if first := encoder.first_special(rest):
        return Turn(start, after + first[1])
    if index == len(messages) - 1 and encoder.eos:
        return Turn(start, len(located.text), appends_eos=True)
    raise TemplateError(f"no end-of-turn token follows turn {index}, so the model would not learn to stop", mend=_mend(index))


def _start(located: Located, first: int, opening: Located | None, fields: Sequence[Field], encoder: Encoder) -> int | None:
    """Where the model takes over: the end of the generation prompt if the conversation has it in this place, else the turn's first mark,
    or the markup before it where the turn begins with a tool call."""
    mark, before = located.marks[first], located.marks[first - 1] if first else None
    begin = before.position if before else 0
    if opening is not None:
        last = opening.marks[-1] if opening.marks else None
        if (before and before[:2]) == (last and last[:2]):
            asked, written = opening.text[last.position if last else 0 :], located.text[begin : mark.position]
            shared = _shared(asked, written)
            if shared == len(asked):
                return begin + shared
            if fields[mark.field].kind == "name":
                return begin + encoder.not_inside_special(written, shared)
    return mark.position if mark.opens else None


def _check_written(index: int, messages: Sequence[dict[str, Any]], found: Sequence[int], fields: Sequence[Field]) -> None:
    """Every field of the turn is there once. Reasoning may be left out of turns before the last question, as reasoning models do."""
    if not found:
        raise TemplateError(f"turn {index} is empty, or the template leaves it out", mend=_mend(index))
    asked = max((number for number, message in enumerate(messages) if message["role"] == "user"), default=-1)
    for number, field in enumerate(fields):
        if field.message == index:
            times = found.count(number)
            if times > 2:
                raise TemplateError(f"the template writes the {field.kind} of turn {index} more than once", mend=_mend(index))
            if not times and not (field.kind == "reasoning" and index < asked):
                raise TemplateError(f"the template leaves out the {field.kind} of turn {index} ({field.text[:40]!r})", mend=_mend(index))


def _mend(index: int) -> str:
    return f"give message {index} weight 0, leave the row out, or name a template that fits in model.chat_template"
