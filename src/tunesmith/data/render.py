"""Rendering: a record becomes token ids and a loss weight for each, by the model's own chat template.

What carries loss is everything the model itself has to write once it is asked: from the end of the generation prompt (or, where the
template writes that differently in a finished conversation, from the answer itself) over reasoning, content and tool calls as the template
writes them, to the end-of-turn token. The newline after it is the template's. Spans are found in the full render by marks (_marks.py),
never by rendering prefixes, since many templates rewrite earlier turns; what cannot be found exactly is refused with a TemplateError.
The text is tokenised once and split by offsets (_encode.py), with no token that the template did not write, and strings in a row
that look like control tokens stay text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from rich.text import Text

from ..errors import TemplateError
from ._encode import Encoded, Encoder, Rule, encoder_for
from ._marks import Located, Marked, data_spans, locate, mark, unmarked
from ._spans import Layout, Turn, find_turn, layout_for, with_parts
from .records import Conversation, Document, Message, Record
from .template import ChatTemplate, RenderJob

ROWS_PER_BATCH = 256

TrainOn = Literal["all", "last"]
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Rendered:
    """A rendered example.

    ids: int32[T]. weights: float32[T], weights[t] the loss weight of predicting token t from those before it; weights[0] is 0.
    prompt_length: the tokens before the last answer, the same ids that `encode_prompt` gives for the messages before it.
    """

    ids: np.ndarray
    weights: np.ndarray
    prompt_length: int


class _Row(NamedTuple):
    """A conversation to be rendered. loss: weight by message index, where it is above 0. last: index of the last assistant turn."""

    record: Conversation
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    loss: dict[int, float]
    last: int | None
    marked: Marked


class _Found(NamedTuple):
    """A rendered text and what is known of it. prompt: the text that asks for the last turn, with its rules, where that has to be
    the beginning of the whole. before: the ids that the tokenizer itself puts before plain text."""

    text: str
    rules: tuple[Rule, Rule]
    turns: dict[int, Turn]
    loss: dict[int, float]
    last: int | None
    prompt: tuple[str, tuple[Rule, Rule]] | None = None
    before: tuple[int, ...] = ()


def render(record: Record, template: ChatTemplate | None, tokenizer: Any, *, train_on: TrainOn = "all") -> Rendered:
    """One record as a rendered example; raises TemplateError where it is ambiguous. See `render_records`."""
    (result,) = render_records([record], template, tokenizer, train_on)
    if isinstance(result, TemplateError):
        raise result
    return result


def render_records(
    records: Iterable[Record], template: ChatTemplate | None, tokenizer: Any, train_on: TrainOn = "all"
) -> Iterator[Rendered | TemplateError]:
    """Each record's rendered example or the reason it has none, in order, some 250 rows at a time (about 1 ms a row).

    A Conversation: assistant turns carry loss, all or the last; a message's own `weight` wins (0 for none, any number above it scales).
    A Document: what the tokenizer puts before plain text (a BOS, or nothing), the text, and one end-of-sequence token; every token but the
    first, and none of those before the text, has weight 1. template may be None where there
    are only documents. Raises ModelError where the tokenizer cannot say which characters a token covers.
    """
    encoder = encoder_for(tokenizer)
    rest = iter(records)
    while chunk := list(islice(rest, ROWS_PER_BATCH)):
        rows = [_attempt(record, _prepare, record, template, encoder, train_on) for record in chunk]
        found = _render_rows(rows, template, encoder)
        encoded = iter(encoder.encode_all([one.text for one in found if isinstance(one, _Found)]))
        for record, one in zip(chunk, found, strict=True):
            yield one if isinstance(one, TemplateError) else _attempt(record, _finish, one, next(encoded), encoder)


def _attempt(record: Record, function: Callable[..., Result], *arguments: Any) -> Result | TemplateError:
    """The function's result, or its TemplateError with the row's place."""
    try:
        return function(*arguments)
    except TemplateError as error:
        return TemplateError(error.what, where=f"{record.source} ({record.row_id})", mend=error.mend)


def _prepare(record: Record, template: ChatTemplate | None, encoder: Encoder, train_on: TrainOn) -> _Row | _Found:
    if isinstance(record, Document):
        return _document(record, encoder)
    if template is None:
        raise TemplateError("a conversation needs a chat template", mend="set model.chat_template")
    layout = layout_for(template, encoder)
    tools = list(record.tools) if record.tools else None
    messages = with_parts(record.to_hf(), layout)
    _refuse_hidden_control(messages, tools, encoder)
    answers = [index for index, message in enumerate(record.messages) if message.role == "assistant"]
    last = answers[-1] if answers else None
    loss = {index: weight for index in range(len(messages)) if (weight := _weight(record.messages[index], index == last, train_on))}
    return _Row(record, messages, tools, loss, last, mark(messages))


def _document(record: Document, encoder: Encoder) -> _Found:
    """A document is one turn from beginning to end."""
    if encoder.eos is None:
        raise TemplateError("the tokenizer has no end-of-sequence token to end a document with", mend="set eos_token in the tokenizer")
    text = record.text + encoder.eos
    rules = Rule(encoder.special_mask, [(0, len(record.text))]), Rule(encoder.special_mask, [])
    return _Found(text, rules, {0: Turn(0, len(text))}, {0: 1.0}, 0, before=encoder.before_text)


def _weight(message: Message, is_last: bool, train_on: TrainOn) -> float:
    if message.role != "assistant":
        if message.weight:
            raise TemplateError(f"a {message.role} message has a weight; only assistant turns carry loss", mend="take the weight out")
        return 0.0
    if message.weight is None:
        return 1.0 if train_on == "all" or is_last else 0.0
    if not 0 <= message.weight < float("inf"):
        raise TemplateError(f"a message's weight is {message.weight}", mend="give 0 or a number above it")
    return float(message.weight)


def _refuse_hidden_control(messages: Sequence[dict], tools: Sequence[dict] | None, encoder: Encoder) -> None:
    if token := encoder.holds_special("\0".join(unmarked(messages, tools))):
        raise TemplateError(
            f"a role, a name or a tool's description holds the control token {token!r}", mend="take it out: it would steer the model"
        )


def _render_rows(
    rows: Sequence[_Row | _Found | TemplateError], template: ChatTemplate | None, encoder: Encoder
) -> list[_Found | TemplateError]:
    """Renders the conversations, in one batch for the child process, and finds what carries loss."""
    jobs: list[RenderJob] = []
    places: list[dict[str, int]] = []
    for row in rows:
        wanted: dict[str, RenderJob] = {}
        if isinstance(row, _Row):
            wanted["whole"] = RenderJob(row.messages, row.tools)
            wanted["marked"] = RenderJob(row.marked.messages, row.tools)
            for turn in _turns(row):
                wanted[f"marked {turn}"] = RenderJob(row.marked.messages[:turn], row.tools, True)
            if row.last is not None:
                wanted["prompt"] = RenderJob(row.messages[: row.last], row.tools, True)
        places.append({name: len(jobs) + place for place, name in enumerate(wanted)})
        jobs.extend(wanted.values())
    if template is None or not jobs:
        return [row for row in rows if not isinstance(row, _Row)]
    results, layout = template.render_many(jobs), layout_for(template, encoder)
    found: list[_Found | TemplateError] = []
    for row, names in zip(rows, places, strict=True):
        if isinstance(row, _Row):
            texts = {name: results[place] for name, place in names.items()}
            found.append(_attempt(row.record, _locate_row, row, texts, layout, encoder))
        else:
            found.append(row)
    return found


def _turns(row: _Row) -> list[int]:
    """The turns whose place is wanted: those that carry loss, and the last."""
    return sorted({*row.loss, *([] if row.last is None else [row.last])})


def _locate_row(row: _Row, texts: dict[str, str | TemplateError], layout: Layout, encoder: Encoder) -> _Found:
    located = _checked(texts["whole"], texts["marked"], row.marked)
    if row.tools and not any(name in located.text for name in map(_tool_name, row.tools)):
        raise TemplateError("the template does not write the row's tools", mend="use a template that knows tools, or leave them out")
    rules = _rules(located, row.messages, row.marked, layout, encoder)
    turns: dict[int, Turn] = {}
    for index in _turns(row):
        asked = texts[f"marked {index}"]
        opening = locate(asked, row.marked) if isinstance(asked, str) else None
        try:
            turns[index] = find_turn(index, row.messages, located, opening, row.marked.fields, layout, encoder)
        except TemplateError:
            if index in row.loss:
                raise
    found = _Found(located.text, rules, turns, row.loss, row.last)
    if row.last is None or row.last not in row.loss:
        return found
    prompt, turn = _checked(texts["prompt"], texts[f"marked {row.last}"], row.marked), turns[row.last]
    if not located.text.startswith(prompt.text) or turn.start != len(prompt.text):
        raise TemplateError(
            f"the template asks for the last answer in another way than it writes it: the prompt ends {prompt.text[-40:]!r}, "
            f"the whole conversation reads {located.text[max(0, turn.start - 40) : turn.start + 20]!r} there",
            mend="give the answer the reasoning that the prompt opens, or name a template that fits in model.chat_template",
        )
    text = located.text + (encoder.eos or "") if turn.appends_eos else located.text
    return found._replace(text=text, prompt=(prompt.text, _rules(prompt, row.messages, row.marked, layout, encoder)))


def _tool_name(tool: dict[str, Any]) -> str:
    inner = tool.get("function")
    return str((inner if isinstance(inner, dict) else tool).get("name"))


def _checked(real: str | TemplateError, with_marks: str | TemplateError, marked: Marked) -> Located:
    """The real render with the marks' places, when both renders agree."""
    if isinstance(real, TemplateError):
        raise real
    if isinstance(with_marks, TemplateError):
        raise with_marks
    located = locate(with_marks, marked)
    if located.text != real:
        raise TemplateError(
            "the template writes other text when a message's content changes, so what belongs to the answer is not certain",
            mend="take markup that the template reads (such as <think> or <tool_response>) out of the content, or leave the row out",
        )
    return located


def _rules(located: Located, messages: Sequence[dict], marked: Marked, layout: Layout, encoder: Encoder) -> tuple[Rule, Rule]:
    spans = data_spans(located, marked.fields)
    found = {number for number, opens, _ in located.marks if opens} & {number for number, opens, _ in located.marks if not opens}
    for number, _, _ in located.marks:
        if number not in found and (token := encoder.holds_special(marked.fields[number].text)):
            raise TemplateError(
                f"the template cuts into a message that holds the control token {token!r}", mend="take it out of the message"
            )
    users = [(start, end) for start, end, index in spans if messages[index]["role"] != "assistant"]
    return Rule(encoder.special_mask, [span[:2] for span in spans]), Rule(layout.markup, users)


def _finish(row: _Found, whole: Encoded, encoder: Encoder) -> Rendered:
    """Ids and weights of a row that was located."""
    whole = encoder.protect(row.text, whole, row.rules)
    if row.before:
        nowhere = np.zeros(len(row.before), dtype=np.int64)
        ids = np.concatenate([np.array(row.before, dtype=np.int32), whole.ids])
        whole = Encoded(ids, np.concatenate([nowhere, whole.starts]), np.concatenate([nowhere, whole.ends]))
    prompt_length = len(whole.ids)
    if row.prompt is not None:
        whole, prompt_length = _with_prompt(row, *row.prompt, whole, encoder)
    elif row.last in row.turns:
        prompt_length = int(np.searchsorted(whole.starts, row.turns[row.last].start))
    weights = np.zeros(len(whole.ids), dtype=np.float32)
    for index, weight in row.loss.items():
        covered = _covered(row, row.turns[index], whole, encoder)
        weights[max(covered.start, prompt_length if index == row.last else 1, 1) : covered.stop] = weight
    return Rendered(whole.ids, weights, prompt_length)


def _with_prompt(row: _Found, prompt: str, rules: tuple[Rule, Rule], whole: Encoded, encoder: Encoder) -> tuple[Encoded, int]:
    """The tokens, the first of which are those of the prompt, and how many these are.

    A control token separates what is before it from what is after it, so only the prompt's end from its last one on is tokenised
    again. Where a token spans the end of the prompt the text is split there, as it is when the model is asked.
    """
    end = len(prompt)
    ending = np.flatnonzero(encoder.special_mask[whole.ids] & (whole.ends <= end))
    begin = int(whole.starts[ending[-1]]) if len(ending) else -1
    if begin >= max((stop for _, stop in rules[0].spans), default=0):
        first, tail = int(ending[-1]), encoder.encode_tail(prompt[begin:])
    else:
        first, tail = 0, encoder.protect(prompt, encoder.encode_all([prompt])[0], rules).ids.tolist()
    length = first + len(tail)
    if not np.array_equal(whole.ids[first:length], tail):
        whole = encoder.protect(row.text, encoder.encode_split(row.text, [end]), row.rules, [end])
        if not np.array_equal(whole.ids[first:length], tail):
            raise TemplateError(
                "the prompt's tokens are not the first ones of the whole conversation",
                mend="the tokenizer looks across control tokens, which cannot be trained exactly: use another model folder",
            )
    return whole, length


def _covered(row: _Found, turn: Turn, whole: Encoded, encoder: Encoder) -> slice:
    """The tokens of a turn: those that share a character with it, but for a control token that begins before it."""
    end = len(row.text) if turn.appends_eos else turn.end
    first, stop = int(np.searchsorted(whole.ends, turn.start, side="right")), int(np.searchsorted(whole.starts, end, side="left"))
    while first < stop and whole.starts[first] < turn.start and int(whole.ids[first]) in encoder.special:
        first += 1
    for token in {first, stop - 1}:
        place = (int(whole.starts[token]), int(whole.ends[token]))
        if first < stop and (place[0] < turn.start or place[1] > end) and row.rules[1].holds(place):
            raise TemplateError(
                f"one token holds the end of a question and the beginning of an answer: {row.text[slice(*place)]!r}",
                mend="use a template that separates turns by special tokens",
            )
    return slice(first, stop)


def encode_prompt(
    messages: Sequence[Message], template: ChatTemplate, tokenizer: Any, tools: Sequence[dict[str, Any]] | None = None
) -> np.ndarray:
    """The token ids (int32[T]) that ask for the next answer: the messages and the generation prompt, tokenised as in training."""
    return encode_prompts([messages], template, tokenizer, tools)[0]


def encode_prompts(
    prompts: Sequence[Sequence[Message]], template: ChatTemplate, tokenizer: Any, tools: Sequence[dict[str, Any]] | None = None
) -> list[np.ndarray]:
    """`encode_prompt` of many, at once. Raises TemplateError for the first that cannot be rendered, naming its number."""
    given = tuple(tools) if tools else None
    results = prompt_results([(messages, given) for messages in prompts], template, tokenizer)
    for number, result in enumerate(results):
        if isinstance(result, TemplateError):
            raise TemplateError(result.what, where=f"prompt {number}", mend=result.mend) from result
    return [result for result in results if not isinstance(result, TemplateError)]


def prompt_results(
    prompts: Sequence[tuple[Sequence[Message], Sequence[dict[str, Any]] | None]], template: ChatTemplate, tokenizer: Any
) -> list[np.ndarray | TemplateError]:
    """`encode_prompt` of many (messages, tools), at once: the ids of each, or the reason it has none."""
    encoder = encoder_for(tokenizer)
    layout = layout_for(template, encoder)
    given = [with_parts([message.to_hf() for message in messages], layout) for messages, _ in prompts]
    offered = [list(tools) if tools else None for _, tools in prompts]
    marked = [mark(messages) for messages in given]
    jobs = [
        RenderJob(one, tools, True)
        for messages, with_marks, tools in zip(given, marked, offered, strict=True)
        for one in (messages, with_marks.messages)
    ]
    texts = template.render_many(jobs)
    results: list[np.ndarray | TemplateError] = []
    found: list[tuple[int, str, tuple[Rule, Rule]]] = []
    for number, messages in enumerate(given):
        try:
            _refuse_hidden_control(messages, offered[number], encoder)
            located = _checked(texts[2 * number], texts[2 * number + 1], marked[number])
            found.append((number, located.text, _rules(located, messages, marked[number], layout, encoder)))
            results.append(np.empty(0, dtype=np.int32))
        except TemplateError as error:
            results.append(error)
    for (number, text, rules), one in zip(found, encoder.encode_all([text for _, text, _ in found]), strict=True):
        try:
            results[number] = encoder.protect(text, one, rules).ids
        except TemplateError as error:
            results[number] = error
    return results


def stop_tokens(template: ChatTemplate, tokenizer: Any) -> list[int]:
    """The ids with which an answer ends: the template's end-of-turn tokens and the tokenizer's end of sequence, in order of id."""
    encoder = encoder_for(tokenizer)
    stops = layout_for(template, encoder).stops
    return sorted(number for number, token in encoder.special.items() if token in stops)


def colourise(rendered: Rendered, tokenizer: Any) -> Text:
    """The example for a terminal: what carries loss in green (brighter for more weight), the rest dim, special tokens in brackets."""
    special = encoder_for(tokenizer).special
    text, start, ids = Text(), 0, rendered.ids.tolist()
    for stop in range(1, len(ids) + 1):
        same = stop < len(ids) and rendered.weights[stop] == rendered.weights[start] and not {ids[stop], ids[stop - 1]} & special.keys()
        if not same:
            weight = float(rendered.weights[start])
            style = f"rgb(0,{95 + int(160 * min(weight, 1.0))},0)" if weight else "dim"
            before = ids[max(0, start - 1) : start]  # decoded too: alone, a word may lose the space before it
            piece = tokenizer.decode(before + ids[start:stop])[len(tokenizer.decode(before)) :]
            text.append(f"[{special[ids[start]]}]" if ids[start] in special else piece, style=style)
            start = stop
    return text
