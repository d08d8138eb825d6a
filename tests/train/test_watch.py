"""What is watched of answers, and each stop rule: broken, just kept, and switched off."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tunesmith.recipe import WatchSection
from tunesmith.train.watch import Baseline, broken_rule, repetition, watch_answers

OFF = WatchSection(max_kl=None, max_length_ratio=None, min_distinct_ratio=None, min_entropy=None)
METRICS = {"kl": 4.0, "length": 30.0, "distinct": 0.3, "entropy": 0.5}
RULES = {"max_kl": (4.0, 3.9), "max_length_ratio": (3.0, 2.9), "min_distinct_ratio": (0.5, 0.51), "min_entropy": (0.5, 0.51)}


def answer(tokens: list[int], text: str, reason: str = "stop") -> SimpleNamespace:
    return SimpleNamespace(generation=SimpleNamespace(token_ids=tokens, text=text, finish_reason=reason))


def baseline(length: float = 10.0, distinct: float = 0.6) -> Baseline:
    made = Baseline()
    made.see({"length": length, "distinct": distinct})
    return made


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_is_broken_beyond_its_limit_kept_at_it_and_silent_when_it_is_off(rule):
    kept, broken = RULES[rule]
    assert broken_rule(OFF, METRICS, baseline()) is None
    assert broken_rule(OFF.model_copy(update={rule: kept}), METRICS, baseline()) is None
    found = broken_rule(OFF.model_copy(update={rule: broken}), METRICS, baseline())
    assert found == {"rule": rule, "value": kept, "limit": broken}


def test_of_several_broken_rules_one_is_told():
    limits = {rule: broken for rule, (_, broken) in RULES.items()}
    assert broken_rule(OFF.model_copy(update=limits), METRICS, baseline())["rule"] == "max_kl"


def test_length_and_distinct_answers_are_measured_against_the_first_iteration_alone_and_a_checkpoint_keeps_it():
    first = baseline(10.0, 0.6)
    first.see({"length": 99.0, "distinct": 0.1})
    again = Baseline()
    again.load(first.state())
    for one in (first, again):
        assert broken_rule(OFF.model_copy(update={"max_length_ratio": 2.9}), METRICS, one)["value"] == 3.0
        assert broken_rule(OFF.model_copy(update={"min_distinct_ratio": 0.6}), METRICS, one)["value"] == 0.5
    fresh = Baseline()
    fresh.load({})
    assert fresh.state() == {}
    assert all(isinstance(tensor, torch.Tensor) for tensor in first.state().values())


def test_few_distinct_answers_are_no_collapse_where_there_were_no_more_at_first():
    watch, few = OFF.model_copy(update={"min_distinct_ratio": 0.1}), METRICS | {"distinct": 0.04}
    assert broken_rule(watch, few, baseline(distinct=0.05)) is None
    assert broken_rule(watch, few, baseline(distinct=0.5))["value"] == pytest.approx(0.08)


def test_a_length_of_0_at_first_and_answers_without_a_kl_break_no_rule():
    watch = OFF.model_copy(update={"max_length_ratio": 1.5, "max_kl": 0.1})
    without = {name: value for name, value in METRICS.items() if name != "kl"}
    assert broken_rule(watch, without, baseline(length=0.0)) is None


def test_answers_are_watched_by_length_end_and_likeness():
    answers = [answer([1, 2, 3], "a"), answer([1, 1, 1, 1, 1], "b", "length"), answer([4], "a")]
    found = watch_answers(answers, 1)
    assert found == pytest.approx({"length": 3.0, "finished": 2 / 3, "distinct": 2 / 3, "repetition": 2 / 9})


def test_answers_to_one_prompt_may_be_alike_and_only_those_to_different_prompts_are_compared():
    groups = {"each its own": "aabbccdd", "two alike": "aabbaadd", "all alike": "abacadae"}
    found = {name: watch_answers([answer([1], text) for text in texts], 2)["distinct"] for name, texts in groups.items()}
    assert found == {"each its own": 1.0, "two alike": 0.75, "all alike": 0.25}


@pytest.mark.parametrize("tokens, share", [([], 0.0), ([1, 2], 0.0), ([1, 2, 3, 1, 2, 3], 0.25), ([7] * 4, 0.5)])
def test_repetition_is_the_share_of_threes_that_were_there_before(tokens, share):
    assert repetition(tokens) == pytest.approx(share)
