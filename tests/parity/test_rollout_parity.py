"""GRPO and RLOO against TRL's on the same sampled answers, to 1e-5: loss, gradients and what is logged."""

from __future__ import annotations

from types import MethodType, SimpleNamespace

import pytest
import torch
from tests.objectives.cases import make_case
from tests.parity.peers import fused_model, sampled, table, trainer
from tests.parity.test_preference_parity import compare
from tests.toys import tiny_model
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer

from tunesmith.models.policy import Policy
from tunesmith.objectives import GRPO, RLOO
from tunesmith.recipe.objective import GRPOObjective, RLOOObjective


def sampled_case(name: str) -> tuple:
    """A case on the tiny model's own answers, and the batch as TRL has it."""
    case = make_case(name, Policy(tiny_model("llama")), seed=11)
    inputs = sampled([item[0] for item in case.items])
    width = inputs["completion_ids"].shape[1]
    named = {
        "old_per_token_logps": "old_S",
        "ref_per_token_logps": "reference_S",
        "importance_sampling_ratio": "correction_S",
        "advantages": "advantage_S",
    }
    inputs |= {theirs: table(case.columns[ours], width) for theirs, ours in named.items()}
    inputs["advantages"] = inputs["advantages"][:, 0]
    return case, inputs


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("kl_coef", [0.0, 0.2])
def test_grpo_is_trls(loss_type, kl_coef):
    ours = GRPOObjective.model_construct(loss_type=loss_type, kl_coef=kl_coef, epsilon=0.2, epsilon_high=0.3)
    case, inputs = sampled_case("grpo dapo")
    case.objective, model = GRPO(ours), fused_model()
    peer = trainer(
        model.eval(),
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=kl_coef,
        loss_type=loss_type,
        epsilon_low=0.2,
        epsilon_high=0.3,
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        max_completion_length=16,
        _entropy_bonus_enabled=False,
        args=SimpleNamespace(use_bias_correction_kl=True, delta=None),
    )
    peer._get_per_token_logps_and_entropies = MethodType(GRPOTrainer._get_per_token_logps_and_entropies, peer)
    loss = GRPOTrainer._compute_loss(peer, model, inputs | {"num_items_in_batch": inputs["completion_mask"].sum()})
    result = compare(model, loss, case)
    logged = {key: values[0] for key, values in peer._metrics["eval"].items()}
    assert result.metrics["entropy"] == pytest.approx(logged["entropy"], rel=1e-4)
    for side in ("low", "high", "region"):
        assert result.metrics[f"clip_ratio/{side}_mean"] == pytest.approx(logged[f"clip_ratio/{side}_mean"], abs=1e-6)
    assert logged["clip_ratio/low_mean"] > 0
    assert logged["clip_ratio/high_mean"] > 0


def test_rloo_is_trls():
    case, inputs = sampled_case("rloo")
    case.objective, model = RLOO(RLOOObjective.model_construct(epsilon=0.4)), fused_model()
    case.columns["correction_S"] = [0 * values + 1 for values in case.columns["correction_S"]]
    inputs["old_logps"] = (inputs["old_per_token_logps"] * inputs["completion_mask"]).sum(1)
    peer = trainer(model.eval(), epsilon_low=0.4, epsilon_high=0.4)
    peer._get_per_token_logps_and_entropies = MethodType(RLOOTrainer._get_per_token_logps_and_entropies, peer)
    loss = RLOOTrainer._compute_loss(peer, model, inputs)
    result = compare(model, loss, case)
    logged = {key: values[0] for key, values in peer._metrics["eval"].items()}
    assert result.metrics["entropy"] == pytest.approx(logged["entropy"], rel=1e-4)
    assert result.metrics["clip_ratio/region_mean"] == pytest.approx(logged["clip_ratio/region_mean"])
    assert 0 < logged["clip_ratio/region_mean"] < 1
    torch.testing.assert_close(torch.tensor(result.metrics["clip_ratio/low_mean"]), torch.tensor(logged["clip_ratio/low_mean"]))
