"""The rules by which a stage that learns from its own answers is stopped: at an iteration that breaks one, and an error at the first."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.train.answers import Sampler, make_policy, make_source, objective_of

from tunesmith.errors import RolloutFailed

OFF = dict.fromkeys(["max_kl", "min_distinct_ratio", "min_entropy"])


@pytest.mark.parametrize("rule", OFF)
def test_a_stop_rule_ends_the_stage_at_the_iteration_that_breaks_it_and_not_inside_one(rule):
    policy = make_policy(changed=0.0)
    objective = objective_of("grpo", num_iterations=2)
    settings = {"policy": policy, "rollout": {"max_mismatch": 99.0}}
    first = make_source(objective, watch=OFF, **settings).window(0).metrics
    limits = {"max_kl": 0.05, "min_distinct_ratio": 0.5, "min_entropy": first["entropy"] - 0.05}
    later = Alike(policy) if rule == "min_distinct_ratio" else Sampler(policy)
    made = [make_source(objective, watch=OFF | {name: limits[name] for name in chosen}, **settings) for chosen in ((), (rule,))]
    for source in made:
        assert source.window(0).stop is None
        alter(policy)
        source.parts = replace(source.parts, sampler=later)
        assert source.window(1).stop is None  # its answers are learned from as they were begun
        stop = source.window(2).stop
        assert stop is None if source is made[0] else stop["rule"] == rule
        assert source.window(3).stop is None
        alter(policy, 0.0)


def alter(policy, by: float = 0.5) -> None:
    """Moves the policy away from where it began, to where it is more certain; or back."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * by)


@pytest.mark.parametrize("rule, limit", [("max_kl", 0.05), ("min_entropy", 50.0)])
def test_a_rule_that_the_first_answers_break_is_an_error_that_names_it(rule, limit):
    source = make_source(policy=make_policy(changed=0.5), watch={rule: limit})
    with pytest.raises(RolloutFailed, match=f"the first answers break the rule {rule}") as raised:
        source.window(0)
    assert raised.value.where == f"stages.sft.watch.{rule}"
    assert raised.value.mend


def test_first_answers_that_are_all_alike_break_no_rule():
    policy = make_policy()
    settings = {
        "policy": policy,
        "sampler": Alike(policy),
        "reward": lambda answers: [0.0] * len(answers),
        "rollout": {"max_mismatch": 99.0},
    }
    source = make_source(watch={"min_distinct_ratio": 0.9}, **settings)
    assert source.window(0).stop is None
    assert source.window(1).stop is None


class Alike(Sampler):
    """Gives every prompt the first one's answer."""

    def __call__(self, prompts, *, seeds, **given):
        return super().__call__([prompts[0]] * len(prompts), seeds=[seeds[0]] * len(seeds), **given)
