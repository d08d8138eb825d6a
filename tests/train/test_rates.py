"""The rate of a stage that names none."""

from __future__ import annotations

import pytest

from tunesmith.recipe import Stage
from tunesmith.train.rates import SWEPT, WIDTH, usual_rate
from tunesmith.train.stage import derive_stage


def rate(method: object, objective: str = "sft", *, width: int = WIDTH, quantised: bool = False, **settings) -> float:
    stage = Stage(name="s", objective=objective, method=method, **settings)
    return derive_stage(stage, 12, width=width, quantised=quantised).learning_rate


def test_a_wider_model_takes_less_and_a_narrower_one_no_more():
    assert rate("full") == SWEPT["full"]
    assert rate("full", width=4 * WIDTH) == pytest.approx(SWEPT["full"] / 4)
    assert rate("full", width=16) == SWEPT["full"]


@pytest.mark.parametrize(("objective", "share"), [("sft", 1), ("reward", 1), ("best_of_n", 1), ("dpo", 0.1), ("orpo", 0.1), ("grpo", 0.1)])
def test_what_moves_a_model_by_comparisons_or_rewards_takes_a_tenth(objective, share):
    stage = Stage(name="s", objective="sft", method="lora")
    kind = type("Kind", (), {"type": objective})()
    assert usual_rate(stage.method, kind, width=WIDTH, quantised=False) == pytest.approx(share * SWEPT["lora"])


def test_variants_have_rates_of_their_own_and_a_recipes_rate_wins():
    pissa = {"type": "lora", "init_lora_weights": "pissa"}
    assert rate("lora", quantised=True) == SWEPT["qlora"] != rate("lora") == SWEPT["lora"]
    assert rate(pissa) == rate(pissa, quantised=True) == SWEPT["pissa"]
    assert rate({"type": "bottleneck", "architecture": "houlsby"}) == SWEPT["houlsby"]
    assert rate("lora", width=9999, learning_rate=3e-5) == 3e-5


def test_what_trains_fastest_goes_at_the_swept_rate():
    assert rate({"type": "lora", "r": 16, "use_rslora": True}) == pytest.approx(SWEPT["lora"] / 4, rel=0.02)
    assert rate({"type": "lora", "loraplus_lr_ratio": 16}) == pytest.approx(SWEPT["lora"] / 16, rel=0.02)
