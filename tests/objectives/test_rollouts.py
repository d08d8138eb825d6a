"""The objectives on sampled answers: the KL's value and gradient, what each token weighs, what is clipped, and the value loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.objectives.cases import Case, make_case, random_outputs

from tunesmith.models.policy import TokenOutputs
from tunesmith.objectives import GRPO, PPO, RLOO
from tunesmith.objectives._rollout import kl_k1, kl_k3, kl_penalty, rollout_metrics
from tunesmith.objectives.ppo import clipped_value_loss
from tunesmith.recipe.objective import GRPOObjective, PPOObjective, RLOOObjective

LOSS_TYPES = ("grpo", "dr_grpo", "dapo")
OLD = torch.log(torch.tensor([8, 4, 2, 1, 1], dtype=torch.float64) / 16)  # a vocabulary of five
REFERENCE = torch.log(torch.tensor([1, 3, 5, 3, 4], dtype=torch.float64) / 16)
TOKENS = np.repeat(np.arange(5), [8, 4, 2, 1, 1])  # sixteen answers of one token, exactly as often as OLD samples them


def grpo(**changed: object) -> GRPO:
    settings = {"loss_type": "dapo", "kl_coef": 0.0, "epsilon": 0.2, "epsilon_high": None}
    return GRPO(GRPOObjective.model_construct(**(settings | changed)))


def answers(lengths: list[int], objective: object, **columns: list[np.ndarray]) -> Case:
    """Sampled answers of given lengths after a token of prompt; columns not given are neutral."""
    items = [((np.arange(1, n + 2) % 90, np.array([0] + [1] * n, dtype=np.float32)),) for n in lengths]
    neutral = {"old_S": 0.0, "reference_S": 0.0, "advantage_S": 1.0, "correction_S": 1.0}
    made = {name: [np.full(n, value) for n in lengths] for name, value in neutral.items()}
    return Case(objective, items, made | {"max_new_tokens": [1000]} | columns)


def exact_kl(logits: torch.Tensor) -> torch.Tensor:
    logp = torch.log_softmax(logits, dim=0)
    return (logp.exp() * (logp - REFERENCE)).sum()


def kl_gradient(objective: GRPO, logits: torch.Tensor) -> torch.Tensor:
    """The gradient by the logits of an objective's loss on the sixteen answers, whose advantages are 0."""
    case = answers(
        [1] * 16,
        objective,
        old_S=[OLD[[t]].numpy() for t in TOKENS],
        reference_S=[REFERENCE[[t]].numpy() for t in TOKENS],
        advantage_S=[np.zeros(1)] * 16,
    )
    leaf = logits.clone().requires_grad_()
    batch = case.batch()
    terms = objective.terms(TokenOutputs(logprobs=torch.log_softmax(leaf, 0)[torch.from_numpy(TOKENS)]), batch)
    divisors = objective.divisors(batch)
    loss = sum(term.coefficient * term.sum / divisors[name] for name, term in terms.items())
    return torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
@pytest.mark.parametrize("moved", [0.0, 0.7], ids=["at the sampler", "after it moved"])
def test_the_kl_coefficient_has_the_gradient_of_the_exact_kl(loss_type, moved):
    logits = OLD + moved * torch.tensor([1.0, -1, 0.5, 0, 0.3], dtype=torch.float64)
    leaf = logits.clone().requires_grad_()
    want = torch.autograd.grad(exact_kl(leaf), leaf)[0]
    without, with_kl = (kl_gradient(grpo(loss_type=loss_type, kl_coef=coef), logits) for coef in (0.0, 1.0))
    assert not without.any()
    assert want.abs().max() > 0.1
    torch.testing.assert_close(with_kl, want, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(kl_gradient(grpo(kl_coef=0.3), logits), 0.3 * want, rtol=1e-10, atol=1e-12)


def test_without_the_ratio_the_gradient_would_be_that_of_another_divergence():
    leaf = OLD.clone().requires_grad_()
    k3 = kl_k3(torch.log_softmax(leaf, 0)[torch.from_numpy(TOKENS)], REFERENCE[torch.from_numpy(TOKENS)]).mean()
    got, want = torch.autograd.grad(k3, leaf)[0], torch.autograd.grad(exact_kl(leaf), leaf)[0]
    assert (got - want).abs().max() > 0.1


def test_the_estimates_of_the_kl_have_its_value_in_the_mean_over_samples():
    want = float(exact_kl(OLD))
    tokens = torch.from_numpy(TOKENS)
    for estimate in (kl_k1(OLD, REFERENCE), kl_k3(OLD, REFERENCE), kl_penalty(OLD, OLD, REFERENCE)):
        assert float(estimate[tokens].mean()) == pytest.approx(want, rel=1e-12)
    assert (kl_k3(OLD, REFERENCE) >= 0).all()


def test_the_logged_kl_of_sampled_answers_is_the_exact_one_within_three_sigma_in_nats_a_sequence():
    rng, rows, length = np.random.default_rng(0), 400, 5
    sampled = rng.choice(5, size=(rows, length), p=OLD.exp().numpy())
    old, reference = (list(table.numpy()[sampled]) for table in (OLD, REFERENCE))
    batch = answers([length] * rows, grpo(), old_S=old, reference_S=reference).batch()
    outputs = TokenOutputs(logprobs=torch.from_numpy(np.concatenate(old)), entropy=torch.ones(rows * length))
    metrics = {name: total / divisor for name, (total, divisor) in rollout_metrics(outputs, batch).items()}
    want = length * float(exact_kl(OLD))
    for name, estimate in (("kl", kl_k1), ("kl_k3", kl_k3)):
        sigma = float(estimate(OLD, REFERENCE)[torch.from_numpy(sampled)].sum(1).std()) / rows**0.5
        assert abs(metrics[name] - want) <= 3 * sigma
        assert metrics[name] >= -3 * sigma
    assert metrics["policy_kl"] == 0
    assert metrics["entropy"] == 1


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_what_a_token_of_a_short_and_of_a_long_answer_weighs_is_what_the_loss_type_says(loss_type):
    lengths, objective = [10, 1000], grpo(loss_type=loss_type, kl_coef=0.5)
    batch = answers(lengths, objective).batch()
    logprobs = torch.zeros(1010, dtype=torch.float64, requires_grad=True)
    terms, divisors = objective.terms(TokenOutputs(logprobs=logprobs), batch), objective.divisors(batch)
    weights = torch.autograd.grad(-terms["policy"].sum / divisors["policy"], logprobs)[0]
    want = {"grpo": (1 / 20, 1 / 2000), "dr_grpo": (1 / 2000, 1 / 2000), "dapo": (1 / 1010, 1 / 1010)}[loss_type]
    np.testing.assert_allclose(weights[:10], want[0], rtol=1e-12)
    np.testing.assert_allclose(weights[10:], want[1], rtol=1e-12)
    assert divisors["kl"] == divisors["policy"]


def test_clip_higher_widens_the_upper_side_alone():
    ratios = torch.tensor([0.7, 0.9, 1.1, 1.25, 1.4], dtype=torch.float64)
    for advantage, free in ((1.0, [True, True, True, True, False]), (-1.0, [False, True, True, True, True])):
        objective = grpo(epsilon=0.2, epsilon_high=0.3)
        batch = answers([5], objective, advantage_S=[np.full(5, advantage)]).batch()
        logprobs = ratios.log().requires_grad_()
        loss = objective.terms(TokenOutputs(logprobs=logprobs), batch)["policy"].sum
        gradient = torch.autograd.grad(loss, logprobs)[0]
        np.testing.assert_allclose(gradient, [-advantage * float(q) * f for q, f in zip(ratios, free, strict=True)], atol=1e-12)
        outputs = TokenOutputs(logprobs=ratios.log(), entropy=torch.zeros(5))
        metrics = objective.metrics(outputs, batch)
        low, high = (metrics[f"clip_ratio/{side}_mean"][0] for side in ("low", "high"))
        assert (low, high) == ((0, 1) if advantage > 0 else (1, 0))
        assert metrics["ratio"][0] == pytest.approx(float(ratios.sum()))


def test_the_correction_weighs_the_policy_term_and_not_the_kl():
    objective = grpo(kl_coef=0.5)
    plain = answers([3, 2], objective, reference_S=[np.full(3, -1.0), np.full(2, -1.0)])
    halved = answers([3, 2], objective, reference_S=[np.full(3, -1.0), np.full(2, -1.0)], correction_S=[np.full(3, 0.5), np.full(2, 0.5)])
    outputs = TokenOutputs(logprobs=torch.full((5,), 0.05, dtype=torch.float64))
    a, b = objective.terms(outputs, plain.batch()), objective.terms(outputs, halved.batch())
    assert float(b["policy"].sum) == pytest.approx(0.5 * float(a["policy"].sum))
    assert float(b["kl"].sum) == float(a["kl"].sum) > 0


def test_rloos_ratio_is_of_the_whole_answer():
    objective = RLOO(RLOOObjective.model_construct(epsilon=0.2))
    batch = answers([2, 3], objective, advantage_S=[np.full(2, 1.5), np.full(3, -2.0)]).batch()
    logprobs = torch.tensor([0.05, 0.05, -0.1, -0.1, -0.1], dtype=torch.float64, requires_grad=True)
    loss = objective.terms(TokenOutputs(logprobs=logprobs), batch)["policy"].sum
    assert loss.item() == pytest.approx(-1.5 * np.exp(0.1) + 2 * 0.8)
    np.testing.assert_allclose(torch.autograd.grad(loss, logprobs)[0], [-1.5 * np.exp(0.1)] * 2 + [0] * 3, atol=1e-12)
    assert objective.divisors(batch) == {"policy": 2}
    metrics = objective.metrics(TokenOutputs(logprobs=logprobs, entropy=torch.zeros(5)), batch)
    assert metrics["clip_ratio/low_mean"] == (1, 2)
    assert metrics["ratio"][0] / metrics["ratio"][1] == pytest.approx((np.exp(0.1) + np.exp(-0.3)) / 2)


def test_rloo_weighs_an_answer_by_the_mean_of_its_tokens_corrections():
    objective, outputs = RLOO(RLOOObjective.model_construct(epsilon=0.2)), TokenOutputs(logprobs=torch.zeros(3, dtype=torch.float64))
    batch = answers(
        [2, 1], objective, advantage_S=[np.full(2, 1.5), np.full(1, 4.0)], correction_S=[np.array([0.5, 1.5]), np.array([0.25])]
    )
    assert float(objective.terms(outputs, batch.batch())["policy"].sum) == pytest.approx(-1.5 * 1.0 - 4 * 0.25)


def test_how_far_the_policy_has_moved_is_never_negative_and_is_a_sequences():
    old = [OLD.numpy(), OLD.numpy()]
    now = torch.log_softmax(OLD + torch.tensor([0.5, -0.5, 0.2, 0.0, 0.1], dtype=torch.float64), 0)
    batch = answers([5, 5], grpo(), old_S=old).batch()
    total, rows = rollout_metrics(TokenOutputs(logprobs=torch.cat([now, now]), entropy=torch.zeros(10)), batch)["policy_kl"]
    difference = (now - OLD).numpy()
    assert (total, rows) == (pytest.approx(2 * (np.exp(difference) - 1 - difference).sum()), 2)
    assert total > 0


def test_the_value_loss_takes_the_worse_of_the_value_and_its_clipped_self():
    value, old, returns = (torch.tensor(x, dtype=torch.float64) for x in ([1.0, 1.0, 0.1], [0.0, 0.0, 0.0], [2.0, 0.0, 1.0]))
    got = clipped_value_loss(value, old, returns, clip=0.2)
    want = [max((1 - 2) ** 2, (0.2 - 2) ** 2) / 2, max(1.0, 0.04) / 2, 0.9**2 / 2]
    np.testing.assert_allclose(got, want)


def test_ppo_is_the_clipped_surrogate_and_the_value_loss_over_tokens_by_hand():
    case = make_case("ppo")
    objective, batch = PPO(PPOObjective(reward_model="r", cliprange=0.1, cliprange_value=0.3, vf_coef=0.7)), case.batch()
    outputs = random_outputs(batch)
    column = {name: np.asarray(values, dtype=np.float64) for name, values in batch.columns.items()}
    ratio = np.exp(outputs["logprobs"].numpy() - column["old_S"])
    advantage, value = column["advantage_S"], outputs["values"].numpy()
    policy = -np.minimum(ratio * advantage, np.clip(ratio, 0.9, 1.1) * advantage) * column["correction_S"]
    clipped = column["old_value_S"] + np.clip(value - column["old_value_S"], -0.3, 0.3)
    loss = np.maximum((value - column["return_S"]) ** 2, (clipped - column["return_S"]) ** 2) / 2
    terms = objective.terms(TokenOutputs(**outputs), batch)
    assert float(terms["policy"].sum) == pytest.approx(policy.sum(), rel=1e-10)
    assert float(terms["value"].sum) == pytest.approx(loss.sum(), rel=1e-10)
    assert (terms["policy"].coefficient, terms["value"].coefficient) == (1, 0.7)
    assert set(objective.divisors(batch).values()) == {float(len(value))}
    metrics = {name: total / divisor for name, (total, divisor) in objective.metrics(TokenOutputs(**outputs), batch).items()}
    assert metrics["value_clip_ratio"] == pytest.approx((np.abs(value - column["old_value_S"]) > 0.3).mean())
    assert metrics["values"] == pytest.approx(value.mean())
    assert metrics["returns"] == pytest.approx(column["return_S"].mean())


def test_an_answer_whose_advantage_is_0_moves_nothing_but_is_counted():
    objective = grpo(loss_type="grpo")
    batch = answers([3, 2], objective, advantage_S=[np.zeros(3), np.ones(2)]).batch()
    logprobs = torch.full((5,), 0.05, dtype=torch.float64, requires_grad=True)
    gradient = torch.autograd.grad(objective.terms(TokenOutputs(logprobs=logprobs), batch)["policy"].sum, logprobs)[0]
    assert not gradient[:3].any()
    assert gradient[3:].all()
    assert objective.divisors(batch) == {"policy": 2}
