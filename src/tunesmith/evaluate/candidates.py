"""The candidates that are language models: how each is asked, and what it answers.

zero_shot and few_shot are the base model, decoded under the output schema or the labels so that they are no strawmen; tuned is the
trained model and a stage's name what that stage gave, decoded freely, as their user will run them. All see the same items through the
same chat template, and all are greedy, or sampled at one temperature with one random stream for each item.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..data.records import Message
from ..errors import DataRefused, ModelError, TunesmithError
from ..generate.protocol import GREEDY, Constraint, Generator, Sampling
from ..recipe.evaluate import EvaluateSection
from .encode import Encoder
from .task import Item, Task

COST_ORDER = ("zero_shot", "few_shot", "classical", "tuned")
"""From the least to the most that a user has to do and keep; the recommendation prefers the earlier. Stages come before tuned."""
CONSTRAINED = frozenset({"zero_shot", "few_shot"})
CHECKED_ALONE = 16
"""Prompts whose bf16 answers are made again one by one; fewer items are not worth it."""
CHECKED_TOKENS = 64
"""The longest of those answers, in tokens."""
ANSWER_ROOM = 1.5
"""The longest answer allowed, over the longest reference known."""

Example = tuple[Message, ...]
"""One few-shot example: the turns of a training conversation, without its system message."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One output. tokens: how many were generated, the end token included; token_ids: which."""

    text: str
    finish_reason: str
    tokens: int
    token_ids: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The answer as JSON."""
        return {"text": self.text, "finish_reason": self.finish_reason, "tokens": self.tokens, "token_ids": list(self.token_ids)}


@dataclass(frozen=True)
class Asked:
    """The token ids a candidate is asked with: prompts[N][T], references[N][A] (none unless every item has one), and what was left out."""

    prompts: list[list[int]]
    references: list[list[int]]
    notes: tuple[str, ...] = ()


def is_constrained(candidate: str, task: Task) -> bool:
    """Whether only tokens inside the schema or the labels may be chosen."""
    return candidate in CONSTRAINED and bool(task.fields or task.labels)


def decoding(candidate: str, task: Task, temperature: float = 0.0) -> str:
    """How answers are made, in words: "constrained" or "free", which are greedy, or "sampled at T"."""
    held = is_constrained(candidate, task)
    if temperature == 0:
        return "constrained" if held else "free"
    return f"{'constrained, ' if held else ''}sampled at {temperature:g}"


def derive_max_new_tokens(answer_lengths: Iterable[int]) -> int:
    """Half as much again as the longest known answer, in tokens; from training answers, never from the test set's.

    >>> derive_max_new_tokens([10, 41])
    62
    """
    return math.ceil(ANSWER_ROOM * max(answer_lengths, default=1))


def with_examples(messages: Sequence[Message], examples: Sequence[Example]) -> tuple[Message, ...]:
    """The prompt with the examples as real chat turns between its system message and the rest."""
    heads = 0
    while heads < len(messages) and messages[heads].role == "system":
        heads += 1
    turns = [message for example in examples for message in example]
    return (*messages[:heads], *turns, *messages[heads:])


def encode_items(
    task: Task,
    encoder: Encoder,
    *,
    examples: Sequence[Example] = (),
    max_new_tokens: int,
    context_length: int | None,
    references: bool = True,
) -> Asked:
    """Encodes every item; where prompt and answer do not fit the context, examples are left out from the end, with a note.

    references: whether the references are encoded too (for perplexity); without, and where an item has none, Asked.references is empty.
    Raises DataRefused, naming the items, where an item does not fit even alone.
    """
    prompts, answers, short, misfits = [], [], 0, []
    references = references and task.has_references
    limit = math.inf if context_length is None else context_length
    room = max_new_tokens if task.wants_answers else 0
    for item in task.items:
        if not item.messages:
            first, rest = encoder.document(item.reference)
            prompts.append([int(token) for token in first])
            answers.append([int(token) for token in rest])
            if len(first) + len(rest) > limit:
                misfits.append(item.item_id)
            continue
        whole = [encoder.dialogue(dialogue) for dialogue in item.compared]
        longest = max((len(one.prompt) + len(one.answer) for one in whole), default=0)
        kept = list(examples)
        while True:
            messages = with_examples(item.messages, kept)
            prompt = encode_messages(encoder, messages, item)
            answer = _reference(encoder, messages, item) if references else []
            if max(len(prompt) + max(room, len(answer)), longest) <= limit:
                break
            if not kept:
                misfits.append(item.item_id)
                break
            kept.pop()
        short += len(kept) < len(examples)
        prompts.append(prompt)
        if references:
            answers.append(answer)
    if misfits:
        raise DataRefused(
            f"{len(misfits)} of {len(task.items)} items leave no room for {max_new_tokens} new tokens in the model's context of "
            f"{context_length}: {', '.join(misfits[:5])}",
            where=f"task {task.name}",
            mend="shorten or remove these rows, or set evaluate.max_new_tokens lower",
        )
    note = f"{short} of {len(task.items)} items of {task.name} got fewer than {len(examples)} examples: the context is full"
    return Asked(prompts, answers, (note,) if short else ())


def encodable(task: Task, encoder: Encoder, *, max_new_tokens: int, context_length: int | None) -> Task:
    """The task without the items that cannot be asked even without examples: the template refuses them, or they leave no room.

    They are listed in `skipped` with the reason. The rule is `encode_items`' own, so that what is left is what it takes.
    """
    reasons = {}
    for item in task.items:
        try:
            encode_items(replace(task, items=(item,)), encoder, max_new_tokens=max_new_tokens, context_length=context_length)
        except ModelError as error:  # a TemplateError, or what the tokenizer cannot do
            reasons[item.item_id] = error.what
        except DataRefused:
            reasons[item.item_id] = f"it leaves no room for its answer in the model's context of {context_length} tokens"
    return task.without(reasons)


def encode_messages(encoder: Encoder, messages: Sequence[Message], item: Item) -> list[int]:
    """Token ids of a prompt, with the item's tools where it has some."""
    return [int(token) for token in encoder.prompt(messages, item.tools)]


def is_checked_alone(task: Task, section: EvaluateSection, dtype: str) -> bool:
    """Whether answers of the tuned model are made again one by one: greedy ones, in 16 bits."""
    return dtype != "float32" and len(task.items) >= CHECKED_ALONE and not section.temperature


def generate_answers(
    generator: Generator,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    constraint: Constraint | None,
    sampling: Sampling = GREEDY,
    seeds: Sequence[int] | None = None,
) -> list[Answer]:
    """Answers to all prompts, in order, greedy or sampled. No setting of a model's generation_config takes part.

    seeds: one a prompt, each of which decides its answer's random stream. Raises TunesmithError unless there is one answer a prompt.
    """
    how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "sampling": sampling, "constraint": constraint}
    if seeds is not None:
        how["seeds"] = seeds
    made = generator.generate(prompts, **how) if prompts else []
    if len(made) != len(prompts):
        raise TunesmithError(f"{len(prompts)} prompts but {len(made)} answers", mend="report this: the generator is at fault")
    return [Answer(one.text, one.finish_reason, len(one.token_ids), tuple(map(int, one.token_ids))) for one in made]


def _reference(encoder: Encoder, messages: Sequence[Message], item: Item) -> list[int]:
    return [int(token) for token in encoder.answer(messages, item.reference, item.tools)]
