"""Text metrics against the reference package."""

from __future__ import annotations

import pytest
from rouge_score.rouge_scorer import RougeScorer

from tunesmith.score import exact_match, rouge_l

PAIRS = [
    ("Lamp is dead in every socket", "The lamp is dead in all sockets"),
    ("it's minus-eleven outside!", "its minus eleven outside"),
    ("", "something"),
    ("same words", "same words"),
    ("Card was charged twice for order OS-20418", "twice charged the card for OS_20418"),
]


@pytest.mark.parametrize(("prediction", "reference"), PAIRS)
def test_rouge_l_on_ascii_text_equals_the_package_with_its_own_tokenizer(prediction, reference):
    expected = RougeScorer(["rougeL"], use_stemmer=False).score(reference, prediction)["rougeL"].fmeasure
    assert rouge_l(prediction, reference) == expected


def test_rouge_l_reads_words_of_every_script():
    assert rouge_l("Η λάμπα δεν ανάβει", "Η λάμπα δεν ανάβει") == 1.0
    assert rouge_l("für mich", "fur mich") == 0.5


def test_exact_match_ignores_surrounding_whitespace_and_nothing_else():
    assert exact_match("  refund\n", "refund") == 1.0
    assert exact_match("refund now", "refund  now") == 0.0
    assert exact_match("REFUND", "refund") == 0.0
