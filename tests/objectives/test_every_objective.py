"""What holds for every objective: the window's division, the gradient, the metrics, and the start where the policy is the reference."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch
from tests.objectives.cases import (
    PAIRED,
    RANKED,
    SAMPLED,
    VARIANTS,
    Case,
    logprobs_of,
    loss_of,
    make_case,
    make_policy,
    random_outputs,
)
from tests.toys import make_stage

from tunesmith.models.policy import TokenOutputs
from tunesmith.objectives import OBJECTIVES
from tunesmith.objectives._pairs import preference_metrics
from tunesmith.recipe import objective as settings
from tunesmith.train.optimiser import Optimiser
from tunesmith.train.window import run_window


def test_every_objective_that_a_recipe_can_name_has_its_class_and_its_case_here():
    named = {section.model_fields["type"].default for section in get_args(get_args(settings.Objective)[0])}
    assert set(OBJECTIVES) == named == {variant.type for variant in VARIANTS.values()}


def updated(case: Case, batches: list) -> torch.Tensor:
    """All trained weights after two updates on a window, minus where they began."""
    policy = make_policy()
    stage = make_stage(warmup_steps=0, lr_scheduler_type="constant", learning_rate=1e-3)
    optimiser = Optimiser(policy.named_parameters(), stage.model_copy(update={"adam_epsilon": 1e-3}))
    began = optimiser.flat.clone()
    for _ in range(2):
        optimiser.zero_grad()
        run_window(policy, case.objective, batches)
        optimiser.step(1e-2, optimiser.grad_norm())
    return optimiser.flat - began


@pytest.mark.parametrize("name", VARIANTS)
def test_micro_batch_and_accumulation_never_change_the_update_ragged_tail_included(name):
    case = make_case(name, make_policy())
    whole = updated(case, case.batches(8))
    assert whole.abs().max() > 1e-4
    for size in (4, 3, 2, 1):
        assert (updated(case, case.batches(size)) - whole).abs().max() <= 1e-6, size


@pytest.mark.parametrize("name", VARIANTS)
def test_the_loss_and_the_metrics_of_a_window_do_not_depend_on_its_batches(name):
    policy = make_policy()
    case = make_case(name, policy)
    whole = run_window(policy, case.objective, case.batches(8), backward=None)
    for size in (3, 1):
        parts = run_window(policy, case.objective, case.batches(size), backward=None)
        assert parts.loss == pytest.approx(whole.loss, rel=1e-5, abs=1e-6)
        assert parts.metrics == pytest.approx(whole.metrics, rel=1e-4, abs=1e-5)
        assert parts.terms == pytest.approx(whole.terms, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_gradient_is_that_of_finite_differences(name):
    case = make_case(name)
    batch = case.batch()
    outputs = random_outputs(batch)
    used = {"scores"} if name.startswith("reward") else {"logprobs", "values"} & case.objective.needs
    for key in sorted(used):

        def loss(value: torch.Tensor, key: str = key) -> torch.Tensor:
            return loss_of(case.objective, batch, outputs | {key: value})

        leaf = outputs[key].clone().requires_grad_()
        assert torch.autograd.gradcheck(loss, (leaf,), eps=1e-6, atol=1e-7, rtol=1e-5)
        assert torch.autograd.grad(loss(leaf), leaf)[0].abs().max() > 1e-4, key


@pytest.mark.parametrize("name", VARIANTS)
def test_metrics_carry_no_gradient_and_are_finite(name):
    case = make_case(name)
    batch = case.batch()
    outputs = {key: value.requires_grad_(key != "entropy") for key, value in random_outputs(batch).items()}
    metrics = case.objective.metrics(TokenOutputs(**outputs), batch)
    assert all(isinstance(part, float) and math.isfinite(part) for pair in metrics.values() for part in pair)


def started(name: str) -> tuple:
    """A case whose reference and sampler are the policy itself, and its window's result."""
    policy = make_policy()
    case = make_case(name, policy, drift=0.0)
    own = [logprobs_of(policy, row) for item in case.items for row in item]
    columns = {"reference_B": np.array([values.astype(np.float64).sum() for values in own]), "old_S": own, "reference_S": own}
    case.columns = {key: columns.get(key, value) for key, value in case.columns.items()}
    if "correction_S" in case.columns:
        case.columns["correction_S"] = [np.ones_like(values) for values in own]
    if "kto_z0" in case.columns:
        case.columns["kto_z0"] = np.array([0.0])
    return case, run_window(policy, case.objective, case.batches(4))


STARTS = {
    "dpo": math.log(2),
    "dpo conservative": math.log(2),
    "dpo robust": math.log(2),
    "dpo length-normalised": math.log(2),
    "dpo with sft": math.log(2),
    "online_dpo": math.log(2),
    "dpo ipo": (1 / (2 * 0.1)) ** 2,
    "ranking all_pairs": math.log(2),
    "ranking plackett_luce": np.mean([math.log(math.factorial(2 + i % 3)) for i in range(8)]),
    "kto": (4 * 1.5 + 4 * 1.0) / 8 / 2,
}


@pytest.mark.parametrize("name", STARTS)
def test_where_the_policy_is_the_reference_the_loss_starts_at_its_known_value(name):
    _, result = started(name)
    assert result.terms["preference"] == pytest.approx(STARTS[name], abs=1e-6 * max(1, STARTS[name]))
    assert result.metrics["rewards/chosen"] == pytest.approx(0, abs=1e-6)
    if "rewards/margins" in result.metrics:
        assert result.metrics["rewards/margins"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", SAMPLED)
def test_where_the_policy_is_the_sampler_the_ratio_is_1_and_nothing_is_clipped(name):
    case, result = started(name)
    assert result.metrics["ratio"] == pytest.approx(1, abs=1e-5)
    assert result.metrics["clip_ratio/region_mean"] == 0
    for kl in ("kl", "kl_k3", "policy_kl"):
        assert result.metrics[kl] == pytest.approx(0, abs=1e-5)
    advantages, lengths = np.array([a[0] for a in case.columns["advantage_S"]]), np.array([len(a) for a in case.columns["advantage_S"]])
    want = {
        "ppo": -(advantages * lengths).sum() / lengths.sum(),
        "grpo dapo": -(advantages * lengths).sum() / lengths.sum(),
        "grpo dr_grpo": -(advantages * lengths).sum() / (8 * 16),
        "grpo grpo": -advantages.mean(),
        "rloo": -advantages.mean(),
    }
    assert result.terms["policy"] == pytest.approx(want[name], abs=1e-5)
    assert result.terms.get("kl", 0) == pytest.approx(0, abs=1e-6)


def test_a_reward_head_that_says_nothing_starts_at_ln_2_of_a_pair():
    case = make_case("reward all_pairs")
    case.columns = {}
    batch = case.batch()
    terms = case.objective.terms(TokenOutputs(scores=torch.full((len(batch.item_B),), 0.0)), batch)
    assert float(terms["preference"].sum) / 8 == pytest.approx(math.log(2), abs=1e-9)
    assert float(terms["centring"].sum) == 0


@pytest.mark.parametrize(
    "name", [*PAIRED, *sorted(RANKED.keys() - {"reward all_pairs"})]
)  # whose centring pulls scores to 0 from either side
def test_raising_a_better_answer_above_a_worse_one_lowers_the_loss(name):
    case = make_case(name)
    batch = case.batch()
    outputs = random_outputs(batch)
    key = "scores" if name.startswith("reward") else "logprobs"
    leaf = outputs[key].requires_grad_()
    gradient = torch.autograd.grad(loss_of(case.objective, batch, outputs | {key: leaf}), leaf)[0]
    is_first_B = np.diff(batch.item_B, prepend=-1) != 0
    first = is_first_B if key == "scores" else is_first_B[batch.forest.row_S]
    assert (gradient[torch.from_numpy(first)] < 0).all()


def test_a_tie_is_not_counted_as_right():
    rewards_B = torch.tensor([1.0, 1.0, 2.0, 1.0])
    metrics = preference_metrics(rewards_B, rewards_B, np.array([0, 2]), np.array([1, 3]))
    assert metrics["rewards/accuracies"] == (1, 2)


def test_an_item_that_is_not_a_pair_is_refused_by_a_pair_loss():
    case = make_case("ranking plackett_luce")
    with pytest.raises(ValueError, match="not a pair"):
        make_case("dpo").objective.terms(TokenOutputs(**random_outputs(case.batch())), case.batch())
