"""The gold measure: a user's function in a process of its own, one answer never taking another with it."""

from __future__ import annotations

import numpy as np
import pytest

from tunesmith.errors import RecipeError
from tunesmith.score._reward_process import Unscorable
from tunesmith.score.gold import gold_function

POLITE = """
import os, sys, time
print("this goes to nobody")

def checks(prompt, answer):
    if answer == "hang":
        time.sleep(1000)
    if answer == "die":
        os._exit(3)
    if answer == "raise":
        raise KeyError("tone")
    if answer == "exit":
        sys.exit(0)
    if answer == "other":
        return {"polite": 1.0}
    if answer == "large":
        return {"polite": 2.0, "echoes": 0.0}
    if answer == "text":
        return {"polite": "very", "echoes": 0.0}
    if answer == "none":
        return None
    if answer == "process":
        return {"polite": float(os.getpid() == %d), "echoes": 0.0}
    return {"polite": float("please" in answer), "echoes": prompt in answer}
"""


@pytest.fixture
def measure(tmp_path):
    """Makes the measure of the file above; `seconds` as given."""
    import os

    (tmp_path / "gold.py").write_text(POLITE % os.getpid())
    return lambda **settings: gold_function(f"{tmp_path / 'gold.py'}:checks", **settings)


def test_each_answer_has_its_checks_and_their_mean_in_order(measure):
    gold = measure()
    assert gold.checks(["lamp", "lamp"], ["please wait", "your lamp, please"]) == [
        {"polite": 1.0, "echoes": 0.0},
        {"polite": 1.0, "echoes": 1.0},
    ]
    np.testing.assert_array_equal(gold(["lamp", "lamp"], ["please wait", "your lamp, please"]), [0.5, 1.0])


def test_the_measure_runs_in_another_process(measure):
    assert measure().checks(["lamp"], ["process"]) == [{"polite": 0.0, "echoes": 0.0}]


def test_an_answer_on_which_it_hangs_dies_or_raises_takes_no_other_with_it(measure):
    answers = ["please", "hang", "please", "die", "raise", "exit", "please"]
    found = measure(seconds=3).checks(["lamp"] * len(answers), answers)
    assert [isinstance(one, Unscorable) for one in found] == [False, True, False, True, True, True, False]
    assert [one.reason for one in found if isinstance(one, Unscorable)] == [
        "took longer than 3 s and was ended",
        "its process ended (exit status 3)",
        "raised KeyError: 'tone'",
        "raised SystemExit: 0",
    ]
    np.testing.assert_array_equal(np.isnan(measure()(["lamp"] * 2, ["raise", "please"])), [True, False])


def test_the_limit_is_one_answer_s_and_not_that_of_all_together_nor_of_the_start(tmp_path):
    (tmp_path / "slow.py").write_text(
        "import time\ntime.sleep(1.6)\n\ndef checks(prompt, answer):\n    time.sleep(float(answer))\n    return {'ends': 1.0}\n"
    )
    gold = gold_function(f"{tmp_path / 'slow.py'}:checks", seconds=1.5)
    found = gold.checks(["lamp"] * 6, ["0.4"] * 5 + ["1000"])
    assert found == [{"ends": 1.0}] * 5 + [Unscorable("took longer than 1.5 s and was ended")]


def test_prompts_and_answers_of_more_than_a_pipe_holds_are_measured(measure):
    long = "please " * 100_000
    assert measure().checks(["lamp"] * 3, [long] * 3) == [{"polite": 1.0, "echoes": 0.0}] * 3
    assert isinstance(measure().checks(["lamp"] * 2, ["die", long])[1], dict)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("other", "its checks are polite, and another answer's echoes, polite"),
        ("large", "check polite is 2, and not between 0 and 1"),
        ("text", "check polite returned a str instead of a number"),
        ("none", "returned NoneType instead of {name: 0 to 1}"),
    ],
)
def test_what_is_no_set_of_checks_between_0_and_1_is_no_score(measure, answer, reason):
    assert measure().checks(["lamp", "lamp"], ["please", answer])[1] == Unscorable(reason)


@pytest.mark.parametrize(
    ("source", "name", "words"),
    [
        ("def checks(prompt, answer): return {}", "check", "it has no function check; it has checks"),
        ("def checks(prompt): return {}", "checks", "cannot take"),
        ("import nothing_of_that_name", "checks", "nothing_of_that_name"),
    ],
)
def test_a_measure_that_cannot_be_used_is_refused_when_it_is_made(tmp_path, source, name, words):
    (tmp_path / "gold.py").write_text(source)
    with pytest.raises(RecipeError, match="the gold measure cannot be used") as caught:
        gold_function(f"{tmp_path / 'gold.py'}:{name}")
    assert words in caught.value.what


def test_a_setting_without_a_function_or_of_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="names no function"):
        gold_function("gold.py")
    with pytest.raises(RecipeError, match="is not there"):
        gold_function(f"{tmp_path / 'gold.py'}:checks")


def test_a_changed_file_is_another_measure(measure, tmp_path):
    before = measure().sha256
    (tmp_path / "gold.py").write_text((tmp_path / "gold.py").read_text() + "\nMORE = 1\n")
    assert measure().sha256 != before
