"""Records of preferences: pairs, rankings, unpaired answers with a label, and prompts alone.

Like the records of records.py they carry a content hash and their source. What is learned from an answer is exactly the messages after
the prompt: `conversations()` gives the whole dialogues to render, in which earlier assistant turns have weight 0. A record's kind says
what an objective asks for; FORMATS_OF says which formats of a file hold it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from .records import Conversation, Document, Message, Record, Source, canonical, content_id

Kind = Literal["conversation", "pair", "ranking", "unpaired", "prompt"]

FORMATS_OF: dict[Kind, tuple[str, ...]] = {
    "conversation": ("messages", "sharegpt", "prompt_completion", "alpaca", "text"),
    "pair": ("preference",),
    "ranking": ("ranking",),
    "unpaired": ("unpaired",),
    "prompt": ("prompt",),
}
KIND_OF_FORMAT: dict[str, Kind] = {form: kind for kind, forms in FORMATS_OF.items() for form in forms}

Answer = tuple[Message, ...]
"""The messages after a prompt: an assistant turn, or several with the results of tools between them."""
Tools = tuple[dict[str, Any], ...]


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """Two answers to one prompt, the first of which is preferred. margin: by how much, where the row says."""

    prompt: tuple[Message, ...]
    chosen: Answer
    rejected: Answer
    row_id: str
    source: Source
    margin: float | None = None
    tools: Tools | None = None

    @property
    def answers(self) -> tuple[Answer, ...]:
        """Best first."""
        return self.chosen, self.rejected

    def conversations(self) -> tuple[Conversation, ...]:
        """Chosen, rejected."""
        return _conversations(self)


@dataclass(frozen=True, slots=True)
class Ranking:
    """Two or more answers to one prompt, best first."""

    prompt: tuple[Message, ...]
    answers: tuple[Answer, ...]
    row_id: str
    source: Source
    tools: Tools | None = None

    def conversations(self) -> tuple[Conversation, ...]:
        """Best first."""
        return _conversations(self)


@dataclass(frozen=True, slots=True)
class Unpaired:
    """One answer to a prompt and whether it is a good one."""

    prompt: tuple[Message, ...]
    completion: Answer
    label: bool
    row_id: str
    source: Source
    tools: Tools | None = None

    @property
    def answers(self) -> tuple[Answer, ...]:
        """The only one."""
        return (self.completion,)

    def conversations(self) -> tuple[Conversation, ...]:
        """One."""
        return _conversations(self)


@dataclass(frozen=True, slots=True)
class PromptOnly:
    """A prompt to be answered. columns: the row's other keys (reference answers, test code), which reward functions are given."""

    prompt: tuple[Message, ...]
    columns: dict[str, Any]
    row_id: str
    source: Source
    tools: Tools | None = None

    @property
    def answers(self) -> tuple[Answer, ...]:
        """None."""
        return ()

    def conversations(self) -> tuple[Conversation, ...]:
        """None: there is no answer to train on."""
        return ()


Preference = PreferencePair | Ranking | Unpaired | PromptOnly
AnyRecord = Record | Preference


def kind_of_record(record: AnyRecord) -> Kind:
    """The kind that an objective asks for; a Document counts as a conversation, as both train by cross-entropy."""
    kinds: dict[type, Kind] = {PreferencePair: "pair", Ranking: "ranking", Unpaired: "unpaired", PromptOnly: "prompt"}
    return kinds.get(type(record), "conversation")


def prompt_of(record: AnyRecord) -> tuple[Message, ...]:
    """The messages before the answer; none of a document."""
    if isinstance(record, Document):
        return ()
    return record.prompt() if isinstance(record, Conversation) else record.prompt


def dialogues(record: AnyRecord) -> tuple[Record, ...]:
    """What is rendered of a record, in order: itself where it is trained on as it stands, else `conversations()`."""
    return (record,) if isinstance(record, Conversation | Document) else record.conversations()


def make_pair(
    prompt: Sequence[Message],
    chosen: Sequence[Message],
    rejected: Sequence[Message],
    source: Source,
    *,
    margin: float | None = None,
    tools: Sequence[dict[str, Any]] = (),
    system: str | None = None,
) -> PreferencePair:
    """A pair whose id is the hash of the row as given; `system` is put first where the prompt has no system message."""
    row_id = _id("pair", prompt, [chosen, rejected], tools, margin)
    return PreferencePair(_led(prompt, system), tuple(chosen), tuple(rejected), row_id, source, margin, tuple(tools) or None)


def make_ranking(
    prompt: Sequence[Message],
    answers: Sequence[Sequence[Message]],
    source: Source,
    *,
    tools: Sequence[dict[str, Any]] = (),
    system: str | None = None,
) -> Ranking:
    """A ranking, best first; id and `system` as in `make_pair`."""
    row_id = _id("ranking", prompt, answers, tools, None)
    return Ranking(_led(prompt, system), tuple(map(tuple, answers)), row_id, source, tuple(tools) or None)


def make_unpaired(
    prompt: Sequence[Message],
    completion: Sequence[Message],
    label: bool,
    source: Source,
    *,
    tools: Sequence[dict[str, Any]] = (),
    system: str | None = None,
) -> Unpaired:
    """An answer and its label; id and `system` as in `make_pair`."""
    row_id = _id("unpaired", prompt, [completion], tools, label)
    return Unpaired(_led(prompt, system), tuple(completion), label, row_id, source, tuple(tools) or None)


def make_prompt(
    prompt: Sequence[Message],
    columns: dict[str, Any],
    source: Source,
    *,
    tools: Sequence[dict[str, Any]] = (),
    system: str | None = None,
) -> PromptOnly:
    """A prompt and its columns, both of which the id is the hash of; `system` as in `make_pair`."""
    row_id = _id("prompt", prompt, [], tools, columns)
    return PromptOnly(_led(prompt, system), dict(columns), row_id, source, tuple(tools) or None)


def _id(kind: Kind, prompt: Sequence[Message], answers: Sequence[Sequence[Message]], tools: Sequence[dict[str, Any]], more: Any) -> str:
    given = [[message.as_given() for message in messages] for messages in (prompt, *answers)]
    return content_id(canonical([kind, given, list(tools), more]))


def _led(prompt: Sequence[Message], system: str | None) -> tuple[Message, ...]:
    if system and all(message.role != "system" for message in prompt):
        return (Message("system", system), *prompt)
    return tuple(prompt)


def _conversations(record: PreferencePair | Ranking | Unpaired) -> tuple[Conversation, ...]:
    """The dialogues, named RID/0, RID/1 ... where there are several; the answers' turns have weight 1, all before them 0."""
    prompt = tuple(replace(message, weight=0.0) if message.role == "assistant" else message for message in record.prompt)
    several = len(record.answers) > 1
    return tuple(
        Conversation(
            (*prompt, *(replace(message, weight=1.0) if message.role == "assistant" else message for message in answer)),
            f"{record.row_id}/{number}" if several else record.row_id,
            record.source,
            record.tools,
        )
        for number, answer in enumerate(record.answers)
    )
