"""The data checks: what is dropped, what is reported, and that test rows are found among training rows."""

from __future__ import annotations

import random

import numpy as np
import pytest

from tunesmith.data.check import (
    check_data,
    conflicting_answers,
    conflicting_judgements,
    drop_duplicates,
    find_test_overlap,
    length_finding,
    length_quantiles,
    near_duplicates,
    trainable_share,
)
from tunesmith.data.preference import make_pair, make_prompt, make_ranking, make_unpaired
from tunesmith.data.records import Message, Source, make_conversation, make_document
from tunesmith.data.similar import jaccard, near_pairs, nearest, normalise, shingles
from tunesmith.errors import DataRefused
from tunesmith.recipe import DataSection

# Word stock for sentences that are different from each other but share a vocabulary.
STOCK = (
    "the my a card payment account bank transfer money app phone yesterday today still not why how when "
    "does it arrive failed cancel refund fee charge cash machine swallowed pin blocked limit currency "
    "exchange rate top up verify identity lost stolen new please help cannot see statement pending "
    "balance wrong amount twice shop abroad holiday salary friend number code message "
)
WORDS = STOCK.split()


def section(**settings) -> DataSection:
    return DataSection(train="train.jsonl", **settings)


def row(asked: str, answer: str = "ok", line: int = 1, path: str = "train.jsonl", system: str | None = None, **fields):
    return make_conversation([Message("user", asked), Message("assistant", answer, **fields)], Source(path, line), system=system)


def sentences(count: int, seed: int, least: int = 6) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choice(WORDS) for _ in range(draw.randrange(least, 20))).capitalize() + "." for _ in range(count)]


def numbered(texts, path="train.jsonl", system=None):
    return [row(text, f"answer {index}", index + 1, path, system) for index, text in enumerate(texts)]


# duplicates


def test_exact_duplicates_are_dropped_whatever_their_whitespace_and_the_first_stays():
    rows = [row("a b", "yes", 1), row("a  b\n", " yes", 2), row("c", "yes", 3), row("a b", "yes", 4)]
    result = check_data(rows, [], section())
    assert [record.source.line for record in result.records] == [1, 3]
    assert result.dropped == {"duplicate": 2}
    (finding,) = result.findings
    assert finding.to_json() == {
        "check": "duplicate",
        "row_ids": [rows[1].row_id, rows[3].row_id],
        "related_ids": [rows[0].row_id],
        "evidence": "train.jsonl:2, train.jsonl:4 repeat train.jsonl:1",
        "mend": "nothing to do: the first is kept, the others are dropped",
    }


def test_rows_that_differ_in_case_weight_reasoning_or_tools_are_no_duplicates():
    rows = [row("a", "yes"), row("A", "yes"), row("a", "yes", weight=0.5), row("a", "yes", reasoning="hm")]
    rows.append(make_conversation(rows[0].messages, Source("x", 1), tools=[{"name": "f"}]))
    assert len(drop_duplicates(rows)[0]) == 5


def test_documents_are_compared_by_their_text():
    documents = [make_document(text, Source("a", 1)) for text in ("a b", "a\tb ", "c")]
    assert len(drop_duplicates(documents)[0]) == 2


# conflicts


def test_one_prompt_with_different_answers_is_reported_and_the_rarer_answer_is_named():
    rows = [row("a", "yes", 1), row("a ", "no", 2), row("a", "no", 3, reasoning="x"), row("b", "no", 4)]
    (finding,) = conflicting_answers(rows)
    assert (finding.check, finding.row_ids) == ("conflicting_answers", [rows[0].row_id])
    assert finding.related_ids == [rows[1].row_id, rows[2].row_id]
    assert "train.jsonl:1 answers 'yes'" in finding.evidence
    assert [record.source.line for record in check_data(rows, [], section()).records] == [1, 2, 3, 4]


def test_a_prompt_under_another_system_message_does_not_conflict():
    assert conflicting_answers([row("a", "yes", system="Be kind."), row("a", "no", system="Be rude.")]) == []


# near duplicates


def test_near_duplicates_are_reported_as_groups_and_not_dropped():
    long = sentences(40, 1, least=19)
    texts = [*long, long[3] + " thanks", long[7].replace(" ", "  ").upper() + "!!"]
    rows = [row(text, "the same answer for all", index + 1) for index, text in enumerate(texts)]
    result = check_data(rows, [], section(near_duplicate_threshold=0.7))
    assert len(result.records) == 42
    found = {tuple(finding.row_ids): finding for finding in result.findings if finding.check == "near_duplicate"}
    assert set(found) == {(rows[40].row_id,), (rows[41].row_id,)}
    assert found[(rows[40].row_id,)].related_ids == [rows[3].row_id]
    assert "train.jsonl:42 and train.jsonl:8 by 1.00" in found[(rows[41].row_id,)].evidence


def test_an_instruction_repeated_in_every_prompt_makes_no_rows_alike():
    frame = "Read the customer's message below with care and answer with the one label out of the list that fits it best: "
    rows = numbered([frame + text for text in sentences(200, 2)])
    assert near_duplicates(rows, 0.5) == []
    assert find_test_overlap(rows[:100], rows[100:], 0.5) == {}


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.9])
def test_near_pairs_finds_what_comparing_every_pair_finds(threshold):
    draw = random.Random(5)
    texts = sentences(150, 3)
    for text in list(texts):
        words = text.split()
        if draw.random() < 0.7:
            words[draw.randrange(len(words)) if draw.random() < 0.5 else -1] = "otherwise"
        texts.append(" ".join(words))
    sets = [shingles(text) for text in texts]
    exact = {(i, j) for j in range(len(texts)) for i in range(j) if jaccard(sets[i], sets[j]) >= threshold}
    found = {(i, j) for i, j, _ in near_pairs(texts, threshold)}
    assert found <= exact
    assert len(found) >= 0.99 * len(exact) > 20


def test_jaccard_and_shingles_are_as_defined():
    assert shingles("One two, three FOUR") == {"one two three", "two three four"}
    assert shingles("one two") == {"one two"}
    assert shingles("?!") == frozenset()
    assert jaccard(shingles("a b c d"), shingles("a b c e")) == 1 / 3
    assert nearest(["", "a b c"], ["", "a b c"], 0.9) == {1: (1, 1.0)}


@pytest.mark.parametrize(
    "left, right",
    [
        ("Didn't it work?", "didnt it work"),
        ("My e-mail  address", "my E mail address!"),
        ("Where's “my” card…", "wheres my card"),
        ("ＡＢＣ", "abc"),
    ],
)
def test_texts_that_differ_in_case_whitespace_and_punctuation_are_the_same(left, right):
    assert normalise(left) == normalise(right)


@pytest.mark.parametrize(
    "left, right", [("what is 12-5", "what is 12/5"), ("3.50 back", "350 back"), ("x*y", "x-y"), ("कि", "की"), ("-5", "5")]
)
def test_texts_that_mean_something_else_are_not_the_same(left, right):
    assert normalise(left) != normalise(right)


# the test set


def edited(text: str, draw: random.Random) -> str:
    """A copy as it is, in another case, or with its punctuation changed."""
    match draw.randrange(5):
        case 0:
            return text.upper()
        case 1:
            return text.lower().rstrip(".")
        case 2:
            return text.replace(".", "!!").replace(" ", "  ", 2)
        case 3:
            words = text.split()
            return f"{words[0]}, {' '.join(words[1:])}"
    return text


def test_of_fifty_planted_test_rows_forty_eight_are_found_and_false_hits_stay_under_a_percent():
    draw = random.Random(7)
    test = numbered(sentences(150, 11), "test.jsonl")
    clean = sentences(450, 12)
    planted = [edited(record.messages[0].content, draw) for record in draw.sample(test, 50)]
    texts = [(text, False) for text in clean] + [(text, True) for text in planted]
    draw.shuffle(texts)
    train = numbered([text for text, _ in texts])
    result = check_data(train, test, section(test_overlap="drop"))
    dropped = {record.source.line for record in train} - {record.source.line for record in result.records}
    truth = {index + 1 for index, (_, leaked) in enumerate(texts) if leaked}
    assert len(dropped & truth) >= 48
    assert len(dropped - truth) <= 0.01 * len(clean)
    assert result.dropped == {"test_overlap": len(dropped)}
    (finding,) = [finding for finding in result.findings if finding.check == "test_overlap"]
    assert set(finding.row_ids) == {train[line - 1].row_id for line in dropped}
    assert set(finding.related_ids) <= {record.row_id for record in test}


def test_overlap_is_refused_by_default_naming_five_pairs_with_their_places():
    texts = sentences(20, 4)
    train, test = numbered(texts), numbered([text.upper() for text in texts[:8]], "test.jsonl")
    with pytest.raises(DataRefused, match="8 of 20 training rows are also test rows") as caught:
        check_data(train, test, section())
    assert str(caught.value).count("(test.jsonl:") == 5
    assert f"{train[0].row_id} (train.jsonl:1) is {test[0].row_id} (test.jsonl:1)" in str(caught.value)
    assert caught.value.exit_status == 3


def test_a_nearly_equal_test_row_is_found_by_its_similarity():
    texts = sentences(30, 6, least=19)
    train, test = numbered(texts), numbered([texts[4] + " thanks"], "test.jsonl")
    (found,) = find_test_overlap(train, test, 0.9).items()
    assert found[0] == 4
    assert found[1][1] == pytest.approx(len(shingles(texts[4])) / (len(shingles(texts[4])) + 1))
    assert find_test_overlap(train, test, 1.0) == {}


def test_a_test_row_that_many_training_rows_repeat_is_found_in_each():
    train = numbered([*["What is my balance?"] * 15, *sentences(20, 13)])
    assert list(find_test_overlap(train, [row("what is my balance", path="test.jsonl")], 0.9)) == list(range(15))


def test_a_short_last_turn_is_compared_with_what_was_said_before_it():
    def talk(first, path):
        turns = [Message("user", first), Message("assistant", "Sure?"), Message("user", "Yes, please."), Message("assistant", "Done.")]
        return make_conversation(turns, Source(path, 1))

    train = [talk("Delete my account.", "train.jsonl")]
    assert find_test_overlap(train, [talk("Order a pizza.", "test.jsonl")], 0.9) == {}
    assert find_test_overlap(train, [talk("delete my account", "test.jsonl")], 0.9) == {0: (0, 1.0)}


def test_a_system_message_that_all_rows_share_makes_no_overlap():
    train, test = numbered(sentences(20, 8), system="You are helpful."), numbered(sentences(20, 9), "test.jsonl", system="You are helpful.")
    assert find_test_overlap(train, test, 0.9) == {}
    assert find_test_overlap([row("Hi there", system="You are helpful.")], [row("hi there!", system="You are terse.")], 0.9) == {
        0: (0, 1.0)
    }


def test_a_training_set_that_is_the_test_set_leaves_nothing_to_train_on():
    texts = sentences(5, 10)
    with pytest.raises(DataRefused, match="so none remains"):
        check_data(numbered(texts), numbered(texts, "test.jsonl"), section(test_overlap="drop"))


def test_a_test_file_that_repeats_a_row_is_reported_and_loses_nothing():
    test = [row("a b c", "d", 1, "test.jsonl"), row("a b c", "d", 2, "test.jsonl")]
    (finding,) = check_data([row("x")], test, section()).findings
    assert finding.check == "repeated_test_row"


# lengths


def test_length_quantiles_are_those_of_the_rows():
    assert length_quantiles(np.arange(1, 101)) == {"n": 100, "mean": 50.5, "min": 1, "p50": 50, "p90": 90, "p95": 95, "p99": 99, "max": 100}
    assert length_quantiles([]) == {"n": 0}
    assert "p90 90" in length_finding(np.arange(1, 101)).evidence


def test_the_share_of_trainable_tokens_names_rows_without_any():
    finding = trainable_share([100, 100, 200], [10, 0, 30], ["ra", "rb", "rc"])
    assert finding.row_ids == ["rb"]
    assert finding.evidence == "40 of 400 tokens carry loss (10.0%); 1 of 3 rows have none"
    assert trainable_share([100], [50]).mend == "nothing to do"
    assert "nearly all tokens are prompt" in trainable_share([10_000], [5]).mend
    assert trainable_share([], []).row_ids == []


# dialogues


def dialogue(*said: str, path: str = "train.jsonl", line: int = 1):
    return make_conversation([Message(("user", "assistant")[i % 2], text) for i, text in enumerate(said)], Source(path, line))


def test_a_training_row_that_goes_on_with_a_test_row_s_dialogue_is_reported_and_kept():
    begin = ("My card was swallowed by the cash machine.", "Which machine was it?")
    train = [
        dialogue(*begin, "The one at the station, yesterday about noon.", "A new card is on its way.", line=1),
        dialogue(*begin, line=2),
        dialogue("My card was lost.", begin[1], "At the station.", "A new card is on its way.", line=3),
        dialogue("Hello!", "Hi, what is it?", "How do I change my number?", "In the settings.", line=4),
    ]
    test = [
        dialogue(begin[0].upper(), begin[1], "How long does it take until I have a new one?", "Five days.", path="test.jsonl"),
        dialogue("Hello!", "Hi, what is it?", "How do I get a new card?", "In the app.", path="test.jsonl", line=2),
    ]
    result = check_data(train, test, section())
    (finding,) = [one for one in result.findings if one.check == "shared_dialogue"]
    assert finding.row_ids == [train[0].row_id]
    assert finding.related_ids == [test[0].row_id]
    assert "1 of 4 training rows begin with the first question and answer of a test row: train.jsonl:1 and test.jsonl:1" in finding.evidence
    assert "put all rows of a dialogue into one of the files" in finding.mend
    assert result.records == train


def test_a_pair_that_goes_on_with_a_test_row_s_dialogue_is_reported_too():
    begin = ("My card was swallowed by the cash machine.", "Which machine was it?")
    turns = [Message(role, text) for role, text in zip(("user", "assistant", "user"), (*begin, "At the station."), strict=True)]
    judged_ = make_pair(turns, [Message("assistant", "yes")], [Message("assistant", "no")], Source("train.jsonl", 1))
    test = dialogue(*begin, "How long does it take until I have a new one?", "Five days.", path="test.jsonl")
    assert [one.row_ids for one in check_data([judged_], [test], section()).findings] == [[judged_.row_id]]
    assert check_data([judged_], [row(begin[0], begin[1], path="test.jsonl")], section()).findings == []


# preferences


def pair(asked: str, chosen: str, rejected: str, line: int = 1, margin: float | None = None):
    return make_pair(
        *([Message(role, text)] for role, text in (("user", asked), ("assistant", chosen), ("assistant", rejected))),
        Source("train.jsonl", line),
        margin=margin,
    )


def judged(asked: str, answer: str, label: bool, line: int = 1):
    return make_unpaired([Message("user", asked)], [Message("assistant", answer)], label, Source("train.jsonl", line))


def test_a_repeated_pair_is_dropped_and_one_of_another_answer_margin_or_order_stays():
    rows = [pair("a b", "yes", "no", 1), pair(" a  b", "yes\n", "no", 2), pair("a b", "yes", "never", 3), pair("a b", "no", "yes", 4)]
    kept, (finding,) = drop_duplicates([*rows, pair("a b", "yes", "no", 5, margin=2.0)])
    assert [record.source.line for record in kept] == [1, 3, 4, 5]
    assert finding.row_ids == [rows[1].row_id]


def test_repeated_rankings_labels_and_prompts_are_dropped_by_all_that_they_hold():
    answers = [[Message("assistant", word)] for word in "abc"]
    asked, here = [Message("user", "q")], Source("train.jsonl", 1)
    rankings = [make_ranking(asked, answers, here), make_ranking(asked, answers, here), make_ranking(asked, answers[::-1], here)]
    labels = [judged("q", "a", True), judged("q", "a", True), judged("q", "a", False)]
    prompts = [make_prompt(asked, {"gold": 1}, here), make_prompt(asked, {"gold": 1}, here), make_prompt(asked, {"gold": 2}, here)]
    for rows in (rankings, labels, prompts):
        assert drop_duplicates(rows)[0] == [rows[0], rows[2]]


def test_answers_that_are_judged_both_ways_are_reported():
    rows = [pair("q", "a", "b", 1), pair("q", "b", "a", 2), pair("q", "a ", "b", 3), pair("r", "b", "a", 4)]
    (finding,) = conflicting_judgements(rows)
    assert finding.row_ids == [rows[1].row_id]
    assert finding.related_ids == [rows[0].row_id, rows[2].row_id]
    assert "train.jsonl:1, train.jsonl:3 against train.jsonl:2" in finding.evidence
    (finding,) = check_data([judged("q", "a", True, 1), judged("q", "a", False, 2), judged("q", "b", False, 3)], [], section()).findings
    assert finding.check == "conflicting_judgements"


def test_pairs_of_one_prompt_are_no_near_duplicates_and_near_ones_of_another_are():
    asked, other = sentences(2, 21, least=19)
    rows = [
        pair(asked, "yes", "no", 1),
        pair(asked, "yes", "never", 2),
        pair(other, "yes", "no", 3),
        pair(asked + " thanks", "yes", "no", 4),
    ]
    found = near_duplicates(rows, 0.5)
    assert {row_id for finding in found for row_id in [*finding.row_ids, *finding.related_ids]} == {
        r.row_id for r in rows if r is not rows[2]
    }
    assert near_duplicates(rows[:3], 0.5) == []


def test_a_pair_whose_question_is_a_test_row_s_is_found_whatever_kind_the_test_row_is():
    train = [pair(text, "yes", "no", line) for line, text in enumerate(sentences(10, 22), 1)]
    asked = train[3].prompt[0].content.upper()
    for test in (row(asked), pair(asked, "a", "b"), make_prompt([Message("user", asked)], {}, Source("test.jsonl", 1))):
        assert find_test_overlap(train, [test], 0.9) == {3: (0, 1.0)}
    with pytest.raises(DataRefused, match="1 of 10 training rows are also test rows"):
        check_data(train, [row(asked)], section())
