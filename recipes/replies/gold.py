"""The measure of recipes/quickstart-rlhf.yaml that no training stage sees: four checks of a help desk's reply by program.

Takes the customer's message and the reply as text, gives a number from 0 to 1 for each check; their mean is the gold reward. The checks are
simple on purpose, and can be met by a useless answer: what a policy makes of that is what the example shows.
"""

from __future__ import annotations

import re

WORD = re.compile(r"[^\W_]+")
PROMISE = re.compile(r"\b(?:will|shall|going to)\b|'ll\b")
COURTESY = frozenset(
    WORD.findall("please thank thanks sorry apologies apologise apologize welcome kindly glad happy pleased appreciate regret")
)
STOP_WORDS = frozenset(
    WORD.findall(
        """
        about after again also always another because been before being both cannot came come could didn does doesn doing
        done down each else even ever every from gets give goes going gone have having here into isn just keep know last less
        like long made make many maybe mine more most much must need never none nothing once only other over same says seem
        should since some something still such sure take tell than that thats their them then there these they thing things
        this those time till took under until upon very want wants wasn well went were what when where which while whom whose
        will with without would wouldn your yours
        """
    )
)


def checks(prompt: str, answer: str) -> dict[str, float]:
    """The checks by name, each 0 or 1.

    polite: has a word of courtesy. own_words: has at least two of the customer's own content words (over three letters, no stop words).
    acts: asks a question, or says what will be done. ends: at least five words, and the last mark is one that ends a sentence.

    >>> checks("Where is my yellow lamp?", "Sorry! The yellow lamp will leave today.")
    {'polite': 1.0, 'own_words': 1.0, 'acts': 1.0, 'ends': 1.0}
    """
    said = _straight(answer)
    words = WORD.findall(said)
    return {
        "polite": float(not COURTESY.isdisjoint(words)),
        "own_words": float(len(_content_words(_straight(prompt)).intersection(words)) >= 2),
        "acts": float("?" in said or PROMISE.search(said) is not None),
        "ends": float(len(words) >= 5 and said.endswith((".", "!", "?"))),
    }


def gold(prompt: str, answer: str) -> float:
    """The mean of the checks."""
    found = checks(prompt, answer)
    return sum(found.values()) / len(found)


def _straight(text: str) -> str:
    return text.strip().lower().replace("\u2019", "'")


def _content_words(text: str) -> set[str]:
    return {word for word in WORD.findall(text) if len(word) > 3 and not word.isdigit()} - STOP_WORDS
