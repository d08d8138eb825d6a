"""The head of the report: words, figures, and a verdict that no missing measurement can help."""

from __future__ import annotations

import json

import pytest

from tunesmith.report._read import read_run
from tunesmith.report._verdict import difference_words, main_comparison, verdict_view
from tunesmith.report._words import Limits


def change(run_path, **parts):
    """evaluation.json with some of its parts replaced."""
    path = run_path / "evaluation.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **parts}))


def view(run_path):
    return verdict_view(read_run(run_path), Limits())


def metric(value, n=150):
    return {"metrics": {"exact_match": {"value": value, "low": value - 0.05, "high": value + 0.05, "n": n}}}


def compare(difference, low, high, **more):
    return {
        "task": "task",
        "metric": "exact_match",
        "candidate": "tuned",
        "baseline": "few_shot",
        "difference": difference,
        "low": low,
        "high": high,
        **more,
    }


def test_the_sentence_says_both_values_n_the_difference_and_its_interval(run_path):
    change(
        run_path,
        tasks={"task": {"n": 150, "candidates": {"tuned": metric(0.7133), "few_shot": metric(0.0933)}}},
        comparisons=[compare(0.62, 0.54, 0.7)],
    )
    assert view(run_path)["sentences"] == [
        "The tuned model answers 71% of 150 test items exactly right; the same model with 4 examples in the prompt, 9%.",
        "The difference is 62 points (95% interval 54 to 70); chance alone would hardly give that.",
    ]


def test_an_interval_over_zero_says_chance_and_the_smallest_visible_difference(run_path):
    change(run_path, comparisons=[compare(0.02, -0.03, 0.07, minimum_detectable=0.08)])
    said = view(run_path)["sentences"][1]
    assert "includes zero, so it may be chance" in said
    assert "a true difference below 8" in said
    assert "−3" in said


def test_a_difference_without_an_interval_is_not_sold_as_real(run_path):
    change(run_path, comparisons=[compare(0.5, None, None)])
    assert "its interval: NOT MEASURED, so it may be chance" in view(run_path)["sentences"][1]


def test_the_comparison_shown_is_the_first_gates_own(run_path):
    change(run_path, comparisons=[{**compare(0.9, 0.8, 1.0), "baseline": "zero_shot"}, compare(0.6, 0.5, 0.7)])
    assert main_comparison(read_run(run_path))["baseline"] == "few_shot"


@pytest.mark.parametrize(
    ("gates", "shown"),
    [
        ([{"name": "a", "result": "PASS", "reason": ""}], "PASS"),
        ([], "NOT MEASURED"),
        ([{"name": "a", "result": "PASS", "reason": ""}, {"name": "b", "result": "NOT MEASURED", "reason": ""}], "NOT MEASURED"),
        ([{"name": "a", "result": "PASS", "reason": ""}, {"name": "b", "result": "FAIL", "reason": ""}], "FAIL"),
        ([{"name": "a", "result": "skipped", "reason": ""}], "NOT MEASURED"),
        ([{"name": "a"}], "NOT MEASURED"),
    ],
)
def test_pass_is_shown_only_when_every_gate_passed(run_path, gates, shown):
    change(run_path, verdict="PASS", gates=gates)
    got = view(run_path)
    assert got["verdict"] == shown
    assert bool(got["notes"]) == (shown != "PASS")


@pytest.mark.parametrize("stated", ["pass", "", None, 1, "GREAT", ["PASS"], {"PASS": 1}])
def test_an_unknown_verdict_is_not_measured(run_path, stated):
    change(run_path, verdict=stated)
    assert view(run_path)["verdict"] == "NOT MEASURED"


def test_a_run_without_evaluation_has_no_verdict_and_no_figures(run_path):
    (run_path / "evaluation.json").unlink()
    got = view(run_path)
    assert (got["verdict"], got["figures"], got["recommendation"], got["gates"]) == ("NOT MEASURED", [], None, [])


def test_a_perplexity_difference_is_a_ratio_in_percent():
    assert difference_words("perplexity", 0.0218, 0.012, 0.032) == ("+2.2%", "+1.2 to +3.2")
    assert difference_words("exact_match", -0.1, -0.2, 0.0) == ("−10.0 points", "−20.0 to +0.0")
    assert difference_words("rougeL", 0.291, 0.2, 0.3) == ("+0.29", "+0.20 to +0.30")


def test_the_recommendation_is_an_order_in_words(run_path):
    change(run_path, recommendation={"candidate": "few_shot", "reason": "few_shot asks for less in exact_match"})
    got = view(run_path)
    assert got["recommendation"] == "Use the base model with 4 examples in the prompt."
    assert got["reason"].text == "Few-shot asks for less in exact match"


def test_why_nothing_is_recommended_is_said(run_path):
    reason = "NOT MEASURED: tuned alone was measured (exact_match 0.600 on 100 items); there is nothing to compare."
    change(run_path, recommendation={"candidate": None, "reason": reason})
    assert "alone was measured" in view(run_path)["unadvised"]
