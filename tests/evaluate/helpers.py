"""What the evaluation tests share: rows of an invented desk, a word-level encoder, a generator that answers by a script."""

from __future__ import annotations

import json

import numpy as np

from tunesmith.data.preference import make_pair, make_prompt, make_ranking
from tunesmith.data.records import Message, Source, make_conversation
from tunesmith.evaluate.encode import Dialogue
from tunesmith.generate import Generation

SCHEMA = {
    "type": "object",
    "properties": {
        "intent": {"enum": ["defect", "refund", "cancel"]},
        "urgency": {"enum": ["low", "high"]},
        "summary": {"type": "string"},
    },
    "required": ["intent", "urgency", "summary"],
    "additionalProperties": False,
}
WORDS = {"defect": "broken lamp", "refund": "money back", "cancel": "stop my order"}


def ticket(intent="defect", urgency="low", summary="the lamp is dead"):
    """An answer that satisfies SCHEMA."""
    return json.dumps({"intent": intent, "urgency": urgency, "summary": summary})


def row(user, answer, *, system="Fill in a ticket.", line=1):
    """A conversation of one question and its answer."""
    return make_conversation([Message("user", user), Message("assistant", answer)], Source("rows.jsonl", line), system=system)


def prompt_row(user, line=1, **columns):
    """A prompt alone."""
    return make_prompt([Message("user", user)], columns, Source("prompts.jsonl", line))


def pair(user, chosen, rejected, line=1):
    """A preference pair."""
    answers = ([Message("assistant", chosen)], [Message("assistant", rejected)])
    return make_pair([Message("user", user)], *answers, Source("pairs.jsonl", line))


def ranking(user, *answers, line=1):
    """Answers, best first."""
    return make_ranking([Message("user", user)], [[Message("assistant", answer)] for answer in answers], Source("rankings.jsonl", line))


def desk_rows(count, *, start=0):
    """`count` tickets, intents in turn; every third one is urgent; the user's words tell the intent and the urgency."""
    intents = list(WORDS)
    rows = []
    for number in range(start, start + count):
        intent, urgency = intents[number % 3], "high" if number % 4 == 0 else "low"
        text = f"{WORDS[intent]} case {number} {'now please' if urgency == 'high' else 'whenever'}"
        rows.append(row(text, ticket(intent, urgency, f"case {number} about {WORDS[intent]}"), line=number + 1))
    return rows


class WordEncoder:
    """One token a word; knows how to turn ids back to words."""

    def __init__(self, sha256="template-a"):
        self.sha256 = sha256
        self.words: list[str] = []
        self.prompts = 0

    def ids(self, text):
        """Token ids of the words; a new word gets the next id."""
        found = []
        for word in text.split():
            if word not in self.words:
                self.words.append(word)
            found.append(self.words.index(word))
        return found

    def text(self, ids):
        """The words of the ids."""
        return " ".join(self.words[token] for token in ids)

    def prompt(self, messages, tools=None):
        """Role and content of each message, then `assistant:`."""
        self.prompts += 1
        return self.ids(" ".join(f"{message.role}: {message.content}" for message in messages) + " assistant:")

    def answer(self, messages, reference, tools=None):
        """The reference's words and an end token."""
        return self.ids(reference + " <end>")

    def dialogue(self, dialogue):
        """The prompt's words, and the answer's with an end token."""
        *prompt, answer = dialogue.messages
        ids = self.answer(prompt, answer.content)
        return Dialogue(list(self.prompt(prompt)), ids, [True] * len(ids))


class ScriptedGenerator:
    """Answers by `script(prompt text)`; log-probabilities are -`nats` for every token, a little different from row to row."""

    def __init__(self, encoder, script, nats=1.0):
        self.encoder, self.script, self.nats = encoder, script, nats
        self.calls: list[dict] = []

    def generate(self, prompts, *, max_new_tokens, sampling=None, constraint=None, seeds=None):
        """One answer a prompt, and a note of how it was asked."""
        texts = [self.encoder.text(prompt) for prompt in prompts]
        asked = {"prompts": texts, "sampling": sampling, "constraint": constraint, "max_new_tokens": max_new_tokens}
        self.calls.append(asked | ({} if seeds is None else {"seeds": seeds}))
        answers = [self.script(text) for text in texts]
        return [Generation(list(range(len(answer.split()) + 1)), answer, "stop") for answer in answers]

    def logprobs(self, prompts, answers):
        """-nats for every token, times 0.9 to 1.1 by the row's position."""
        self.calls.append({"references": len(answers)})
        factors = [0.9 + 0.2 * (position % 11) / 10 for position in range(len(answers))]
        return [np.full(len(answer), -self.nats * factor, dtype=np.float32) for answer, factor in zip(answers, factors, strict=True)]


def last_question(prompt_text):
    """The words of the last user turn."""
    return prompt_text.rsplit("user:", 1)[1].rsplit("assistant:", 1)[0].strip()


def right_answer(question, *, wrong_below=0):
    """The ticket that desk_rows holds for this question; wrong in its intent for the case numbers below `wrong_below`."""
    number = int(question.split("case ")[1].split()[0])
    intent = next(name for name, words in WORDS.items() if question.startswith(words))
    if number % 100 < wrong_below:
        intent = next(name for name in WORDS if name != intent)
    return ticket(intent, "high" if "now" in question else "low", f"case {number} about {WORDS[intent]}")
