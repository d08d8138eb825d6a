"""Gates, verdict, recommendation: decided by intervals; what is not measured helps nothing."""

from __future__ import annotations

import numpy as np
import pytest

from tunesmith.errors import DataRefused, RecipeError, TemplateError
from tunesmith.evaluate import check_gates, freeze_task
from tunesmith.evaluate.scoring import Scored
from tunesmith.evaluate.verdict import Bootstrap, comparisons, decide_gates, paired_difference, recommend, verdict
from tunesmith.recipe import Gate
from tunesmith.score import Mean, Perplexity

from .helpers import SCHEMA

BOOTSTRAP = Bootstrap()
CHANCE = {"task": {"exact_match": {"value": 0.2, "n": 100}}, "general": {"perplexity": {"value": 97.0, "n": 100}}}


def matches(candidate, right, n=100, *, task="task", items="items", template="template", whole=True):
    """`right` of n items matched exactly: the first ones."""
    statistics = {"exact_match": Mean([1.0] * right + [0.0] * (n - right))}
    return Scored(candidate, task, items, template, statistics, fills_whole_answer=whole)


def guard(candidate, nats, n=100, *, noise=0.02):
    """Perplexity about exp(nats) on n items of ten tokens."""
    per_item = np.random.default_rng(1).normal(nats, noise, n) * 10
    return Scored(candidate, "general", "guard items", "template", {"perplexity": Perplexity(per_item, [10] * n)})


def results(*scored):
    return {(one.task, one.candidate): one for one in scored}


def decide(gate, *scored, chance=CHANCE):
    (found,) = decide_gates([Gate(**gate)], results(*scored), BOOTSTRAP, chance)
    return found["result"], found["reason"]


BETTER = {"metric": "exact_match", "better_than": "few_shot"}
NOT_WORSE = {"metric": "perplexity", "task": "general", "not_worse_than": "zero_shot", "margin": 0.05}


def test_better_than_passes_when_the_whole_interval_lies_above_zero_and_names_its_n():
    result, reason = decide(BETTER, matches("few_shot", 30), matches("tuned", 60))
    assert result == "PASS"
    assert "+0.300" in reason
    assert "95% interval [" in reason
    assert "n = 100" in reason


def test_better_than_fails_as_worse_when_the_whole_interval_lies_below_zero():
    result, reason = decide(BETTER, matches("few_shot", 60), matches("tuned", 30))
    assert result == "FAIL"
    assert reason.startswith("worse: ")


def test_better_than_fails_as_not_shown_with_the_minimum_detectable_effect_when_zero_is_inside():
    result, reason = decide(BETTER, matches("few_shot", 30), matches("tuned", 31))
    assert result == "FAIL"
    assert "not shown: the interval includes zero" in reason
    assert "minimum detectable effect" in reason
    assert "100 items" in reason


def test_better_by_less_than_the_margin_fails_and_says_that_it_is_better():
    result, reason = decide({**BETTER, "margin": 0.25}, matches("few_shot", 30), matches("tuned", 60))
    assert result == "FAIL"
    assert reason.startswith("better, but not shown to be so by more than the margin of 0.25")
    assert decide({**BETTER, "margin": 0.15}, matches("few_shot", 30), matches("tuned", 60))[0] == "PASS"


def test_for_perplexity_lower_is_better_and_the_difference_is_the_ratio_minus_one():
    gate = {"metric": "perplexity", "task": "general", "better_than": "zero_shot"}
    assert decide(gate, guard("zero_shot", 2.0), guard("tuned", 1.8))[0] == "PASS"
    assert decide(gate, guard("zero_shot", 1.8), guard("tuned", 2.0))[0] == "FAIL"
    found = paired_difference(guard("tuned", 1.8), guard("zero_shot", 2.0), "perplexity", BOOTSTRAP)
    assert found.difference == pytest.approx(np.exp(-0.2) - 1, abs=1e-6)


def test_not_worse_than_passes_when_the_bad_end_of_the_interval_is_within_the_margin():
    assert decide(NOT_WORSE, guard("zero_shot", 2.0), guard("tuned", 2.03))[0] == "PASS"
    assert decide(NOT_WORSE, guard("zero_shot", 2.0), guard("tuned", 1.0))[0] == "PASS"
    result, reason = decide(NOT_WORSE, guard("zero_shot", 2.0), guard("tuned", 2.1))
    assert result == "FAIL"
    assert reason.startswith("worse by more than the margin of 0.05")


def test_not_worse_than_fails_when_the_interval_reaches_beyond_the_margin():
    wide = Scored("tuned", "general", "guard items", "template", {"perplexity": Perplexity(np.tile([10.0, 31.0], 10), [10] * 20)})
    base = Scored("zero_shot", "general", "guard items", "template", {"perplexity": Perplexity(np.full(20, 20.0), [10] * 20)})
    result, reason = decide(NOT_WORSE, base, wide)
    assert result == "FAIL"
    assert reason.startswith("not shown to stay within the margin of 0.05")


def test_a_side_that_was_not_measured_makes_the_gate_not_measured():
    assert decide(BETTER, matches("tuned", 60)) == ("NOT MEASURED", "few_shot on task: was not evaluated.")
    classical = Scored("classical", "task", "items", None, {}, not_measured={"rougeL": "it cannot write summary"})
    gate = {"metric": "rougeL", "better_than": "classical"}
    tuned = Scored("tuned", "task", "items", "template", {"rougeL": Mean([1.0] * 20)})
    assert decide(gate, tuned, classical)[0] == "NOT MEASURED"
    assert decide(gate, tuned, classical)[1] == "classical on task: rougeL was not measured: it cannot write summary."


def test_too_few_items_to_show_anything_are_not_measured_however_large_the_difference():
    result, reason = decide(BETTER, matches("few_shot", 0, 5), matches("tuned", 5, 5))
    assert result == "NOT MEASURED"
    assert "n = 5" in reason
    assert "at least 6" in reason
    assert decide(BETTER, matches("few_shot", 0, 6), matches("tuned", 6, 6))[0] == "PASS"


def test_a_guard_that_the_base_itself_does_not_pass_above_chance_is_not_measured():
    at_chance = np.log(97.0)
    result, reason = decide(NOT_WORSE, guard("zero_shot", at_chance), guard("tuned", at_chance))
    assert result == "NOT MEASURED"
    assert "not above chance" in reason
    assert decide(NOT_WORSE, guard("zero_shot", at_chance), guard("tuned", 2.0))[0] == "NOT MEASURED"


def test_staying_near_a_baseline_without_skill_shows_nothing_unless_the_candidate_has_some():
    gate = {"metric": "exact_match", "not_worse_than": "zero_shot", "margin": 0.1}
    assert decide(gate, matches("zero_shot", 0), matches("tuned", 0))[0] == "NOT MEASURED"
    assert decide(gate, matches("zero_shot", 0), matches("tuned", 70))[0] == "PASS"


@pytest.mark.parametrize(
    ("gates", "expected"),
    [
        ([], "NOT MEASURED"),
        (["PASS"], "PASS"),
        (["PASS", "PASS"], "PASS"),
        (["PASS", "NOT MEASURED"], "NOT MEASURED"),
        (["NOT MEASURED", "FAIL"], "FAIL"),
        (["PASS", "FAIL"], "FAIL"),
    ],
)
def test_the_verdict_passes_only_if_every_gate_passes(gates, expected):
    assert verdict([{"result": result} for result in gates]) == expected


def test_scores_through_different_chat_templates_are_never_compared():
    with pytest.raises(TemplateError, match="different chat templates"):
        decide(BETTER, matches("few_shot", 30), matches("tuned", 60, template="another"))
    assert (
        decide({"metric": "exact_match", "better_than": "classical"}, matches("classical", 30, template=None), matches("tuned", 60))[0]
        == "PASS"
    )


def test_scores_on_different_items_are_never_compared():
    with pytest.raises(DataRefused, match="different items"):
        decide(BETTER, matches("few_shot", 30), matches("tuned", 60, items="other items"))


def test_comparisons_are_each_gates_and_tuned_against_every_other_no_pair_twice():
    scored = results(matches("zero_shot", 10), matches("few_shot", 30), matches("tuned", 60), guard("zero_shot", 2.0), guard("tuned", 2.0))
    rows = comparisons(scored, [Gate(**BETTER), Gate(metric="exact_match", candidate="few_shot", better_than="zero_shot")], BOOTSTRAP)
    assert [(one["task"], one["metric"], one["candidate"], one["baseline"]) for one in rows] == [
        ("task", "exact_match", "tuned", "few_shot"),
        ("task", "exact_match", "few_shot", "zero_shot"),
        ("task", "exact_match", "tuned", "zero_shot"),
        ("general", "perplexity", "tuned", "zero_shot"),
    ]
    assert all({"difference", "low", "high", "minimum_detectable", "n", "unit"} <= set(one) for one in rows)
    assert [one["unit"] for one in rows[2:]] == ["share of items", "ratio minus 1"]


def test_the_best_candidate_is_recommended_with_numbers():
    found = recommend(results(matches("zero_shot", 10), matches("few_shot", 30), matches("tuned", 60)), [Gate(**BETTER)], [], BOOTSTRAP)
    assert found["candidate"] == "tuned"
    assert "0.600 on 100 items" in found["reason"]
    assert "tuned against few_shot" in found["reason"]


def test_a_simpler_candidate_wins_when_the_interval_includes_zero():
    found = recommend(results(matches("zero_shot", 10), matches("few_shot", 58), matches("tuned", 60)), [], [], BOOTSTRAP)
    assert found["candidate"] == "few_shot"
    assert "few_shot asks for less" in found["reason"]
    assert "n = 100" in found["reason"]


def test_a_candidate_that_cannot_fill_the_whole_answer_is_never_recommended():
    scored = results(matches("classical", 90, whole=False, template=None), matches("few_shot", 10), matches("tuned", 60))
    assert recommend(scored, [], [], BOOTSTRAP)["candidate"] == "tuned"
    scored = results(matches("classical", 90, template=None), matches("few_shot", 10), matches("tuned", 60))
    assert recommend(scored, [], [], BOOTSTRAP)["candidate"] == "classical"


def test_a_recommended_candidate_that_fails_a_gate_is_said_to():
    scored = results(matches("few_shot", 30), matches("tuned", 60), guard("zero_shot", 2.0), guard("tuned", 2.5))
    gates = [Gate(**BETTER), Gate(**NOT_WORSE)]
    decided = decide_gates(gates, scored, BOOTSTRAP, CHANCE)
    found = recommend(scored, gates, decided, BOOTSTRAP)
    assert found["candidate"] == "tuned"
    assert "but it fails a gate (tuned not worse than zero_shot" in found["reason"]


def test_with_nothing_to_compare_or_nothing_right_nothing_is_recommended():
    alone = recommend(results(matches("tuned", 60)), [], [], BOOTSTRAP)
    assert alone["candidate"] is None
    assert "tuned alone was measured (exact_match 0.600 on 100 items)" in alone["reason"]
    wrong = recommend(results(matches("few_shot", 0), matches("tuned", 0)), [], [], BOOTSTRAP)
    assert wrong == {"candidate": None, "reason": "no candidate got anything right: exact_match 0.000 on 100 items for each."}


def test_candidates_that_are_as_good_at_a_higher_cost_are_named():
    advice = recommend(results(matches("zero_shot", 20), matches("few_shot", 80), matches("tuned", 80)), [], [], BOOTSTRAP)
    assert advice["candidate"] == "few_shot"
    assert "few_shot has the best exact_match: 0.800 on 100 items, as tuned has, at a higher cost" in advice["reason"]


def test_without_scores_nothing_is_recommended():
    assert recommend({}, [], [], BOOTSTRAP)["candidate"] is None


def test_gates_on_metrics_that_nothing_measures_are_refused_before_training():
    task = freeze_task("task", [], schema=SCHEMA, metrics=["exact_match", "field_accuracy"])
    check_gates([Gate(metric="field_accuracy.intent", better_than="zero_shot"), Gate(**BETTER), Gate(**NOT_WORSE)], task)
    for gate, says in (
        ({**BETTER, "metric": "exact_mach"}, "unknown metric"),
        ({**BETTER, "metric": "Accuracy"}, "did you mean exact_match"),
        ({**BETTER, "metric": "macro_f1"}, "not measured"),
        ({**BETTER, "metric": "field_accuracy.intnet"}, "no part 'intnet'"),
        ({**BETTER, "metric": "exact_match.intent"}, "no part 'intent'"),
        ({**NOT_WORSE, "metric": "exact_match"}, "measured by perplexity"),
    ):
        with pytest.raises(RecipeError, match=says) as caught:
            check_gates([Gate(**BETTER), Gate(**gate)], task)
        assert caught.value.where == "evaluate.gates.1.metric"
