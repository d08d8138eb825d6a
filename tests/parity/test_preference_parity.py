"""Losses and gradients of pairs, labels and rewards against TRL's on the same batch, to 1e-5; where TRL has none, against numpy."""

from __future__ import annotations

from itertools import combinations
from types import MethodType, SimpleNamespace

import numpy as np
import pytest
import torch
from tests.objectives.cases import RANKED, Case, logprobs_of, make_case, make_items, random_outputs
from tests.parity.peers import fused_model, padded, trainer
from tests.toys import tiny_model
from torch import nn
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.reward_trainer import RewardTrainer

from tunesmith.data.forest import build_forest
from tunesmith.models.policy import Policy, TokenOutputs
from tunesmith.objectives import OBJECTIVES, kto_z0
from tunesmith.objectives.preference import log_odds
from tunesmith.recipe import objective as settings
from tunesmith.train.window import WindowResult, run_window

REFERENCE_SEED = 5


def compare(theirs: nn.Module, loss: torch.Tensor, case: Case) -> WindowResult:
    """Runs our window over two batches and compares loss and gradients with the peer's, to 1e-5."""
    loss.backward()
    policy = Policy(tiny_model("llama"))
    ours = run_window(policy, case.objective, case.batches(5))
    assert ours.loss == pytest.approx(loss.item(), rel=1e-5, abs=1e-6)
    wanted = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    got = {name: p.grad for name, p in policy.model.named_parameters() if p.grad is not None}
    assert wanted.keys() == got.keys()
    largest = max(float(g.norm()) for g in wanted.values())
    assert largest > 1e-3
    for name, want in wanted.items():
        assert float((got[name] - want).norm()) <= 2e-5 * max(float(want.norm()), 1e-2 * largest), name
    return ours


def reference_sums(items: list) -> np.ndarray:
    """The reference's log-probability of each row's answer, [B]."""
    reference = Policy(tiny_model("llama", seed=REFERENCE_SEED))
    return np.array([logprobs_of(reference, row).astype(np.float64).sum() for item in items for row in item])


def chosen_then_rejected(items: list) -> dict[str, torch.Tensor]:
    return padded([row for k in (0, 1) for row in (item[k] for item in items)])


DPO_PEERS = {
    "sigmoid": (settings.DPOObjective(beta=0.3), ["sigmoid"], [1.0]),
    "ipo": (settings.DPOObjective(loss="ipo", beta=0.3), ["ipo"], [1.0]),
    "robust": (settings.DPOObjective(loss="robust", label_smoothing=0.2, beta=0.3), ["robust"], [1.0]),
    "length-normalised": (settings.DPOObjective(length_normalised=True, beta=2.0), ["sigmoid_norm"], [1.0]),
    "with sft": (settings.DPOObjective(sft_coef=0.4, beta=0.3), ["sigmoid", "sft"], [1.0, 0.4]),
    "online": (settings.OnlineDPOObjective.model_construct(loss="sigmoid", beta=0.3), ["sigmoid"], [1.0]),
}


@pytest.mark.parametrize("name", DPO_PEERS)
def test_dpo_and_its_variants_are_trls(name):
    ours, loss_types, loss_weights = DPO_PEERS[name]
    items, model = make_items("dpo", seed=3), fused_model()
    peer = trainer(
        model,
        ref_model=fused_model(seed=REFERENCE_SEED),
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        loss_types=loss_types,
        loss_weights=loss_weights,
        beta=ours.beta,
        label_smoothing=getattr(ours, "label_smoothing", 0.0),
        use_weighting=False,
    )
    loss = DPOTrainer._compute_loss(peer, model, chosen_then_rejected(items), False)
    result = compare(model, loss, Case(OBJECTIVES[ours.type](ours), items, {"reference_B": reference_sums(items)}))
    logged = {key: values[0] for key, values in peer._metrics["eval"].items()}
    names = ["logps/chosen", "logps/rejected"]
    if name in ("sigmoid", "robust", "with sft", "online"):  # with mean log-ratios, TRL logs the rewards of sums all the same
        names += [f"rewards/{part}" for part in ("chosen", "rejected", "margins", "accuracies")]
    for key in names:
        assert result.metrics[key] == pytest.approx(logged[key], rel=1e-4, abs=1e-5), key


CPO_PEERS = {
    "cpo": (settings.CPOObjective(beta=0.2, label_smoothing=0.1, sft_coef=0.7), {"loss_type": "sigmoid", "cpo_alpha": 0.7}),
    "cpo alone": (settings.CPOObjective(beta=0.2, sft_coef=0.0), {"loss_type": "sigmoid", "cpo_alpha": 0.0}),
    "conservative dpo without reference": (
        settings.DPOObjective(beta=0.2, label_smoothing=0.1, reference="none"),
        {"loss_type": "sigmoid", "cpo_alpha": 0.0},
    ),
    "simpo": (settings.SimPOObjective(beta=2.5, simpo_gamma=0.8, sft_coef=0.3), {"loss_type": "simpo", "cpo_alpha": 0.3}),
}


def concatenated(items: list) -> dict[str, torch.Tensor]:
    """chosen_* and rejected_* as the trainers of CPO and ORPO take them."""
    batch = {}
    for k, name in enumerate(("chosen", "rejected")):
        rows = padded([item[k] for item in items])
        mask = rows.pop("completion_mask")
        batch |= {f"{name}_{key}": value for key, value in rows.items()}
        batch[f"{name}_labels"] = rows["input_ids"].masked_fill(mask == 0, -100)
    return batch


def paired_trainer(kind: type, model: nn.Module, **given: object) -> SimpleNamespace:
    """What CPO's and ORPO's trainers have, with their own static and bound methods."""
    peer = trainer(model, concatenated_inputs=kind.concatenated_inputs, get_batch_logps=kind.get_batch_logps, **given)
    for method in {"concatenated_forward", "cpo_loss", "odds_ratio_loss"} & set(dir(kind)):
        setattr(peer, method, MethodType(getattr(kind, method), peer))
    return peer


@pytest.mark.parametrize("name", CPO_PEERS)
def test_cpo_simpo_and_dpo_without_a_reference_are_trls(name):
    ours, theirs = CPO_PEERS[name]
    items, model = make_items("cpo", seed=4), tiny_model("llama")
    gamma, smoothing = getattr(ours, "simpo_gamma", None), getattr(ours, "label_smoothing", 0.0)
    peer = paired_trainer(
        CPOTrainer, model, beta=ours.beta, alpha=0.0, simpo_gamma=gamma, label_smoothing=smoothing, pad_token_id=0, **theirs
    )
    loss, logged = CPOTrainer.get_batch_loss_metrics(peer, model, concatenated(items))
    result = compare(model, loss, Case(OBJECTIVES[ours.type](ours), items))
    for part in ("chosen", "rejected", "margins", "accuracies"):
        assert result.metrics[f"rewards/{part}"] == pytest.approx(logged[f"rewards/{part}"], rel=1e-4, abs=1e-5)


def test_orpo_is_trls():
    # TRL's cross-entropy is over the prompt too: after a prompt of one token, which nothing predicts, both are over the answer
    items = [tuple((ids[-n:], weights[-n:]) for ids, weights, n in item) for item in _with_one_token_of_prompt(make_items("orpo", seed=6))]
    ours, model = settings.ORPOObjective(beta=0.4), tiny_model("llama")
    peer = paired_trainer(ORPOTrainer, model, beta=0.4, padding_value=0)
    loss, logged = ORPOTrainer.get_batch_loss_metrics(peer, model, concatenated(items))
    result = compare(model, loss, Case(OBJECTIVES["orpo"](ours), items))
    assert result.metrics["log_odds_chosen"] == pytest.approx(logged["log_odds_chosen"], rel=1e-4)
    assert result.metrics["rewards/margins"] == pytest.approx(logged["rewards/margins"], rel=1e-4)
    assert result.terms["cross_entropy"] == pytest.approx(logged["nll_loss"], rel=1e-5)


def test_log_odds_and_their_slope_are_exact_from_hopeless_to_certain():
    p = np.array([1e-12, 1e-3, 0.3, 0.5, 0.7, 1 - 1e-3, 1 - 1e-9])
    logp = torch.from_numpy(np.log(p)).requires_grad_()
    got = log_odds(logp)
    np.testing.assert_allclose(got.detach(), np.log(p) - np.log1p(-p), rtol=1e-6)
    np.testing.assert_allclose(torch.autograd.grad(got.sum(), logp)[0], 1 / (1 - p), rtol=1e-6)
    certain = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    assert torch.isfinite(torch.autograd.grad(log_odds(certain).sum(), certain)[0]).all()
    assert torch.isfinite(log_odds(certain)).all()


def _with_one_token_of_prompt(items: list) -> list:
    return [[(ids, weights, int(weights.sum()) + 1) for ids, weights in item] for item in items]


def test_kto_is_trls_with_its_kl_from_mismatched_rows():
    items, labels = make_items("kto", seed=1), np.array([1, 0, 1, 1, 0, 0, 1, 0], dtype=bool)
    rows = [item[0] for item in items]
    crossed = [_answer_after(rows[i], rows[i - 1]) for i in range(len(rows))]
    model, reference = fused_model(), fused_model(seed=REFERENCE_SEED)
    batch = padded(rows) | {f"KL_{key}": value for key, value in padded(crossed).items()} | {"label": torch.from_numpy(labels)}
    peer = trainer(model, ref_model=reference, calculate_KL=True, beta=0.2, loss_type="kto", desirable_weight=1.5, undesirable_weight=0.8)
    peer._compute_kl_logps = MethodType(KTOTrainer._compute_kl_logps, peer)
    loss = KTOTrainer._compute_loss(peer, model, batch, False)
    z0 = kto_z0(*(np.array([logprobs_of(Policy(tiny_model("llama", seed=s)), row).sum() for row in crossed]) for s in (0, REFERENCE_SEED)))
    ours = settings.KTOObjective(beta=0.2, desirable_weight=1.5, undesirable_weight=0.8)
    columns = {"reference_B": reference_sums(items), "label_I": labels, "kto_z0": np.array(z0)}
    result = compare(model, loss, Case(OBJECTIVES["kto"](ours), items, columns))
    logged = {key: values[0] for key, values in peer._metrics["eval"].items()}
    assert logged["kl"] > 0
    for key in ("kl", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"):
        assert result.metrics[key] == pytest.approx(logged[key], rel=1e-4), key


def _answer_after(row: tuple, other: tuple) -> tuple:
    """The prompt of one row with the answer of another."""
    prompt, answer = row[0][row[1] == 0], other[0][other[1] != 0]
    return np.concatenate([prompt, answer]), np.concatenate([np.zeros(len(prompt)), np.ones(len(answer))]).astype(np.float32)


def test_z0_is_a_mean_that_is_never_negative():
    assert kto_z0(np.array([-1.0, -2.0]), np.array([-3.0, -3.0])) == 1.5
    assert kto_z0(np.array([-3.0]), np.array([-1.0])) == 0


@pytest.mark.parametrize("margin", [False, True])
@pytest.mark.parametrize("centre", [0.0, 0.3])
def test_the_reward_loss_is_trls(margin, centre):
    items = make_items("dpo", seed=8)
    policy = Policy(tiny_model("llama"))
    torch.manual_seed(2)
    policy.heads["score"] = nn.Linear(32, 1)
    forest = build_forest([row for item in items for row in item])
    with torch.no_grad():
        scores = policy(forest, {"scores"}).scores
    margins = np.linspace(0, 2, len(items), dtype=np.float32)
    logits = torch.stack([*scores[0::2], *scores[1::2]])[:, None].requires_grad_()
    inputs = {"input_ids": None, "attention_mask": torch.ones(1)} | ({"margin": torch.from_numpy(margins)} if margin else {})
    peer = trainer(SimpleNamespace(training=True), args=SimpleNamespace(center_rewards_coefficient=centre or None))
    loss = RewardTrainer.compute_loss(peer, lambda **_: SimpleNamespace(logits=logits), inputs)
    objective = OBJECTIVES["reward"](settings.RewardObjective(center_rewards_coefficient=centre))
    case = Case(objective, items, {"margin_I": margins} if margin else {})
    leaf, batch = scores.clone().requires_grad_(), case.batch()
    ours = sum(t.coefficient * t.sum / len(items) for t in objective.terms(TokenOutputs(scores=leaf), batch).values())
    assert ours.item() == pytest.approx(loss.item(), rel=1e-5)
    wanted = torch.autograd.grad(loss, logits)[0][:, 0]
    torch.testing.assert_close(torch.autograd.grad(ours, leaf)[0].reshape(-1, 2).T.reshape(-1), wanted, rtol=1e-5, atol=1e-7)
    metrics = {name: total / divisor for name, (total, divisor) in objective.metrics(TokenOutputs(scores=leaf), batch).items()}
    for name in ("accuracy", "margin", "mean_reward"):
        assert metrics[name] == pytest.approx(peer._metrics["train"][name][0], rel=1e-5)


def by_hand(name: str, scores: np.ndarray, margin: float = 0.0) -> float:
    """The loss of one order of scores, from the probabilities themselves."""
    if name.endswith("plackett_luce") or name == "ranking without reference":
        return -np.log(np.prod([np.exp(scores[k]) / np.exp(scores[k:]).sum() for k in range(len(scores))]))
    pairs = list(combinations(scores, 2))
    return -sum(np.log(1 / (1 + np.exp(-(better - worse - margin)))) for better, worse in pairs) / len(pairs)


@pytest.mark.parametrize("name", RANKED)
def test_rankings_are_the_probabilities_of_their_order(name):
    case = make_case(name, seed=9)
    batch = case.batch()
    outputs = random_outputs(batch)
    logps = np.zeros(len(batch.item_B))
    np.add.at(logps, batch.forest.row_S, outputs["logprobs"].numpy())
    reward = name.startswith("reward")
    ratio = logps if name.endswith("without reference") else logps - batch.columns.get("reference_B", 0)
    scores_B = outputs["scores"].numpy() if reward else 0.1 * ratio
    orders = [scores_B[batch.item_B == i] for i in range(len(case.items))]
    margins = np.nan_to_num(batch.columns["margin_I"]) if reward else np.zeros(len(orders))
    want = sum(by_hand(name, order, float(m)) for order, m in zip(orders, margins, strict=True))
    got = case.objective.terms(TokenOutputs(**outputs), batch)["preference"].sum
    assert float(got) == pytest.approx(want, rel=1e-9)
    metrics = case.objective.metrics(TokenOutputs(**outputs), batch)
    accuracy = sum(np.mean([better > worse for better, worse in combinations(order, 2)]) for order in orders)
    assert metrics["accuracy" if reward else "rewards/accuracies"] == pytest.approx((accuracy, len(orders)))
    spread = sum(order[0] - order[-1] for order in orders)
    assert metrics["margin" if reward else "rewards/margins"] == pytest.approx((spread, len(orders)))
