"""From an item to token ids: the prompt as the model will be asked, and the reference as training renders it.

An `Encoder` is what the candidates and perplexity take; `TemplateEncoder` is the one on the model's own chat template. Its sha256 goes
into every score: scores of two templates are never compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..data.records import Conversation, Document, Message, Source
from ..data.render import encode_prompt, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..data.template import ChatTemplate

Tools = tuple[dict[str, Any], ...] | None


NO_TEMPLATE = "no template: plain text only"


@dataclass(frozen=True)
class Dialogue:
    """A dialogue as it is judged: ids of the prompt [P], of what follows up to the end of the answer's turn [A], and, for each of those,
    whether it is the answer's own [A]: what tools gave is not."""

    prompt: list[int]
    answer: list[int]
    own: list[bool]


class Encoder(Protocol):
    """Renders and tokenises, always in the same way."""

    sha256: str
    """Hash of the chat template."""

    def prompt(self, messages: Sequence[Message], tools: Tools = None) -> Sequence[int]:
        """Token ids of the prompt, the generation prompt included."""

    def answer(self, messages: Sequence[Message], reference: str, tools: Tools = None) -> Sequence[int]:
        """Token ids of the reference after that prompt, the end-of-turn token included."""

    def document(self, text: str) -> tuple[Sequence[int], Sequence[int]]:
        """A plain text's first token, which nothing predicts, and the rest."""

    def dialogue(self, dialogue: Conversation) -> Dialogue:
        """A whole dialogue whose messages say by their weights what is the answer."""


class TemplateEncoder:
    """The encoder on a chat template and its tokenizer; the same renderer as training's."""

    def __init__(self, template: ChatTemplate | None, tokenizer: PreTrainedTokenizerBase):
        self.template, self.tokenizer, self.sha256 = template, tokenizer, template.sha256 if template else NO_TEMPLATE

    def prompt(self, messages: Sequence[Message], tools: Tools = None) -> np.ndarray:
        """Token ids [T] of the prompt, the generation prompt included."""
        return encode_prompt(messages, self.template, self.tokenizer, tools=tools)

    def answer(self, messages: Sequence[Message], reference: str, tools: Tools = None) -> np.ndarray:
        """Token ids [A] of the reference up to its end-of-turn token: those that training puts loss on.

        Raises TemplateError where the training render does not begin with the prompt's tokens.
        """
        whole = (*messages, Message("assistant", reference))
        conversation = Conversation(messages=whole, row_id="item", source=Source("evaluation", 0), tools=tools)
        rendered = render(conversation, self.template, self.tokenizer, train_on="last")
        end = int(np.flatnonzero(rendered.weights)[-1]) + 1
        return rendered.ids[rendered.prompt_length : end]

    def document(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """A plain text's first token ([1]) and the rest ([T - 1]), the end-of-sequence token included, as training renders it."""
        ids = render(Document(text, row_id="item", source=Source("evaluation", 0)), None, self.tokenizer).ids
        return ids[:1], ids[1:]

    def dialogue(self, dialogue: Conversation) -> Dialogue:
        """The dialogue as training renders it, from its first token to its last supervised one. Raises TemplateError where it cannot be."""
        rendered = render(dialogue, self.template, self.tokenizer)
        supervised = np.flatnonzero(rendered.weights)
        start, end = int(supervised[0]), int(supervised[-1]) + 1
        ids, own = rendered.ids[:end].tolist(), (rendered.weights[start:end] > 0).tolist()
        return Dialogue(ids[:start], ids[start:], own)
