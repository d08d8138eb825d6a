"""Metrics of plain text: one prediction and one reference in, one number in [0, 1] out."""

from __future__ import annotations

import functools
import re

_WORD = re.compile(r"[^\W_]+")


class _Words:
    """The rouge-score package's own words on ASCII text, and whole words in every other script.

    The package keeps only a-z and 0-9: two equal Greek sentences would score 0 and "für" would be two words.
    """

    def tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text.lower())


@functools.cache
def _rouge_scorer():
    # Imported on first use: the package brings nltk, over a second of start-up.
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Words())


def exact_match(prediction: str, reference: str) -> float:
    """1.0 if the two are equal without surrounding whitespace, else 0.0.

    >>> exact_match(" refund\\n", "refund"), exact_match("Refund", "refund")
    (1.0, 0.0)
    """
    return float(prediction.strip() == reference.strip())


def rouge_l(prediction: str, reference: str) -> float:
    """ROUGE-L F-measure (Lin 2004) over lower-cased words, stemmer off, by the rouge-score package.

    >>> rouge_l("the lamp is dead", "the lamp is broken")
    0.75
    """
    return float(_rouge_scorer().score(reference, prediction)["rougeL"].fmeasure)
