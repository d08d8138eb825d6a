"""Intervals and paired differences against scipy, sklearn and arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import f1_score

from tunesmith.score import (
    Average,
    MacroF1,
    Mean,
    Perplexity,
    bootstrap_interval,
    minimum_detectable_effect,
    minimum_items,
    paired_bootstrap,
)


def expanded_level(n: int, confidence: float = 0.95) -> float:
    """Hesterberg 2014, section 5.3: the percentile level with t and the (n - 1) / n variance made good."""
    t = stats.t.ppf((1 + confidence) / 2, n - 1)
    return 1 - 2 * stats.norm.cdf(-math.sqrt(n / (n - 1)) * t)


@pytest.fixture
def scores():
    rng = np.random.default_rng(3)
    baseline = (rng.random(150) < 0.4).astype(float)
    candidate = np.where(rng.random(150) < 0.3, 1.0, baseline)
    return candidate, baseline


@pytest.mark.parametrize("n", [20, 150])
def test_a_paired_interval_equals_scipys_percentile_bootstrap_at_the_expanded_level(scores, n):
    candidate, baseline = (values[:n] for values in scores)
    ours = paired_bootstrap(Mean(candidate), Mean(baseline), resamples=20_000, seed=1)
    theirs = stats.bootstrap(
        (candidate, baseline),
        lambda a, b, axis: a.mean(axis=axis) - b.mean(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=20_000,
        method="percentile",
        confidence_level=expanded_level(n),
        rng=np.random.default_rng(2),
    )
    assert ours.difference == pytest.approx(candidate.mean() - baseline.mean())
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=1.01 / n)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=1.01 / n)
    assert ours.standard_error == pytest.approx(np.std(candidate - baseline, ddof=1) / math.sqrt(n), rel=0.03)


def test_a_paired_interval_lies_near_scipys_bca_interval(scores):
    candidate, baseline = scores
    ours = paired_bootstrap(Mean(candidate), Mean(baseline), resamples=20_000)
    theirs = stats.bootstrap((candidate - baseline,), np.mean, n_resamples=20_000, method="BCa", rng=np.random.default_rng(5))
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.015)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.015)


def test_a_paired_interval_is_narrower_than_the_two_intervals_apart(scores):
    candidate, baseline = scores
    paired = paired_bootstrap(Mean(candidate), Mean(baseline))
    apart = [bootstrap_interval(Mean(values)) for values in scores]
    assert paired.high - paired.low < 0.8 * math.hypot(*(one.high - one.low for one in apart))


def test_intervals_of_ten_items_cover_the_truth_as_often_as_students_and_not_as_seldom_as_a_plain_percentile_interval():
    samples = np.random.default_rng(11).normal(size=(1000, 10))
    ours = [bootstrap_interval(Mean(row, bounds=None), resamples=2000) for row in samples]
    covered = np.mean([one.low <= 0 <= one.high for one in ours])
    student = np.mean(stats.ttest_1samp(samples, 0.0, axis=1).pvalue > 0.05)
    assert abs(covered - student) < 0.015  # a plain percentile interval falls 0.045 behind


def test_the_same_seed_gives_the_same_interval_and_another_seed_another(scores):
    candidate, baseline = (Mean(values) for values in scores)
    assert paired_bootstrap(candidate, baseline, seed=4) == paired_bootstrap(candidate, baseline, seed=4)
    assert bootstrap_interval(Perplexity(scores[0] + 0.3, np.ones(150)), seed=4) != bootstrap_interval(
        Perplexity(scores[0] + 0.3, np.ones(150)), seed=5
    )


def test_resampling_in_blocks_gives_what_one_block_gives(scores, monkeypatch):
    candidate = Mean(scores[0])
    whole = bootstrap_interval(candidate, resamples=500)
    monkeypatch.setattr("tunesmith.score.statistics._CHUNK_ELEMENTS", 150 * 7)
    assert bootstrap_interval(candidate, resamples=500) == whole


def test_all_items_right_is_no_certainty_but_clopper_pearsons_bound():
    found = bootstrap_interval(Mean(np.ones(30)))
    assert found.value == found.high == 1.0
    assert found.low == pytest.approx(stats.binomtest(30, 30).proportion_ci(0.95, method="exact").low)


def test_two_candidates_with_equal_scores_have_an_interval_around_zero_and_a_detectable_effect():
    found = paired_bootstrap(Mean(np.ones(150)), Mean(np.ones(150)))
    assert found.difference == 0.0
    assert -0.05 < found.low < 0.0
    assert found.high == pytest.approx(-found.low)
    assert 0.0 < found.minimum_detectable < 0.06


def test_five_unanimous_items_show_nothing_and_six_do_as_in_a_sign_test():
    assert paired_bootstrap(Mean(np.ones(5)), Mean(np.zeros(5))).low < 0 < stats.binomtest(5, 5).pvalue - 0.05
    assert paired_bootstrap(Mean(np.ones(6)), Mean(np.zeros(6))).low > 0 > stats.binomtest(6, 6).pvalue - 0.05
    assert minimum_items(0.95) == 6


def test_one_item_of_an_unbounded_metric_has_no_interval():
    found = bootstrap_interval(Perplexity([2.0], [1]))
    assert (found.value, found.low, found.high, found.n) == (pytest.approx(math.exp(2.0)), None, None, 1)


@pytest.fixture
def predicted():
    rng = np.random.default_rng(8)
    names = [f"label{code}" for code in range(12)]
    references = [names[code] for code in rng.integers(0, 12, 150)]
    noisy = [names[code] for code in rng.integers(0, 12, 150)]
    predictions = [own if rng.random() < 0.6 else other for own, other in zip(references, noisy, strict=True)]
    predictions[::10] = [None] * len(predictions[::10])
    return references, predictions


def sklearn_macro_f1(references, predictions):
    filled = ["(none)" if label is None else label for label in predictions]
    return f1_score(references, filled, average="macro", labels=sorted(set(references)), zero_division=0)


def test_macro_f1_equals_sklearns_with_invalid_answers_as_wrong_predictions(predicted):
    assert bootstrap_interval(MacroF1(*predicted)).value == pytest.approx(sklearn_macro_f1(*predicted), abs=1e-12)


def test_macro_f1_leaves_out_labels_that_no_reference_has():
    references, predictions = ["a", "a", "b"], ["a", "c", "c"]
    assert bootstrap_interval(MacroF1(references, predictions)).value == pytest.approx(sklearn_macro_f1(references, predictions))


def test_macro_f1_of_each_resample_equals_sklearns_on_the_drawn_items(predicted):
    references, predictions = (labels[:30] for labels in predicted)  # so few that some labels miss in many resamples
    drawn = np.random.default_rng(0).integers(0, 30, size=(20, 30))
    weights = np.stack([np.bincount(row, minlength=30) for row in drawn]).astype(float)
    expected = [sklearn_macro_f1([references[i] for i in row], [predictions[i] for i in row]) for row in drawn]
    np.testing.assert_allclose(MacroF1(references, predictions)(weights), expected, atol=1e-12)


def test_the_average_of_two_macro_f1s_is_their_mean_on_every_resample(predicted):
    one, other = MacroF1(*predicted), MacroF1(predicted[0], predicted[0])
    weights = np.random.default_rng(1).multinomial(150, np.full(150, 1 / 150), size=5).astype(float)
    np.testing.assert_allclose(Average([one, other])(weights), (one(weights) + 1.0) / 2)


def test_perplexity_weighs_tokens_and_its_paired_ratio_is_of_the_resampled_totals():
    rng = np.random.default_rng(2)
    tokens = rng.integers(5, 60, 40)
    base = rng.gamma(2.0, 1.0, 40) * tokens
    tuned = base + rng.normal(0.05, 0.02, 40) * tokens
    found = paired_bootstrap(Perplexity(tuned, tokens), Perplexity(base, tokens), relative=True, resamples=20_000)
    assert found.difference == pytest.approx(math.exp((tuned - base).sum() / tokens.sum()) - 1)
    theirs = stats.bootstrap(
        ((tuned - base), tokens),
        lambda nats, count, axis: np.exp(nats.sum(axis=axis) / count.sum(axis=axis)) - 1,
        paired=True,
        vectorized=True,
        n_resamples=20_000,
        method="percentile",
        confidence_level=expanded_level(40),
        rng=np.random.default_rng(9),
    )
    assert (found.low, found.high) == pytest.approx(tuple(theirs.confidence_interval), abs=5e-4)


def test_the_minimum_detectable_effect_is_shown_in_four_of_five_experiments():
    rng = np.random.default_rng(6)
    n, error = 100, 0.1
    effect = minimum_detectable_effect(error, confidence=0.95)
    means = effect + rng.normal(size=(4000, n)).mean(axis=1) * error * math.sqrt(n)
    shown = np.abs(means) > 1.959964 * error
    assert shown.mean() == pytest.approx(0.8, abs=0.02)


def test_unequal_items_and_no_items_are_refused():
    with pytest.raises(ValueError, match="same items"):
        paired_bootstrap(Mean([1.0]), Mean([1.0, 0.0]))
    with pytest.raises(ValueError, match="no items"):
        bootstrap_interval(Mean([]))
    with pytest.raises(ValueError, match="one token"):
        Perplexity([1.0], [0])
    with pytest.raises(ValueError, match="one token"):
        Perplexity([1.0], [1, 1])
