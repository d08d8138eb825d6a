"""What the plan counts of stages that compare or sample: every pass over every row, and every model that is held."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from tests.toys import ItemsOf, loaded, make_items, make_prompts, make_stage, tiny_model

from tunesmith import planning
from tunesmith.errors import DoesNotFit
from tunesmith.models.plan import Machine
from tunesmith.recipe import Stage

LORA, FULL = {"type": "lora", "r": 4, "target_modules": ["q_proj"]}, {"type": "full"}
PROMPTS, PAIRS, LABELLED = make_prompts(8), make_items(12), make_items(12, answers=1)
JUDGED = {"type": "grpo", "rewards": [{"type": "python", "function": "f.py:f"}]}


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine whose speeds and memory are always the same."""
    monkeypatch.setattr(planning, "measure_machine", lambda dtype: Machine(2e11, 2e10))
    monkeypatch.setattr(planning, "peak_memory_bytes", lambda: 10**9)
    monkeypatch.setattr(planning, "available_memory", lambda: 10**12)


def planned(stages: list[Stage], items: ItemsOf, *, held_out: ItemsOf | None = None, run: Path = Path("no-such-run")) -> dict:
    """The plan of some stages on the same items."""
    data = SimpleNamespace(
        train=items.rows, items=items, validation=held_out.rows if held_out else None, test_records=[], validation_records=[]
    )
    session = SimpleNamespace(
        data_of=lambda stage: data,
        data=data,
        loaded=loaded(tiny_model("llama")),
        stages=stages,
        run=SimpleNamespace(path=run),
        recipe=SimpleNamespace(seed=0, evaluate=SimpleNamespace(candidates=[], gates=[])),
    )
    return planning.make_plan(session)


def flops(plan: dict, name: str) -> float:
    (phase,) = [phase for phase in plan["phases"] if phase["name"] == name]
    return phase["flops"]


def sampling(objective: dict, name: str = "s", **settings) -> Stage:
    """A stage of LoRA that samples 4 answers to each of 2 prompts."""
    kind = {"num_generations": 4, "rewards": JUDGED["rewards"]} | objective
    given = {"method": LORA, "max_steps": 4, "per_device_train_batch_size": 2} | settings
    return make_stage(name=name, objective=kind, rollout={"prompts_per_step": 2, "max_new_tokens": 8}, **given)


def test_an_iteration_costs_the_same_training_into_however_many_updates_it_is_cut():
    whole = planned([sampling({"type": "ppo", "num_mini_batches": 1, "num_ppo_epochs": 1}, max_steps=1)], PROMPTS)
    cut = planned([sampling({"type": "ppo", "num_mini_batches": 4, "num_ppo_epochs": 1}, max_steps=4)], PROMPTS)
    twice = planned([sampling({"type": "ppo", "num_mini_batches": 4, "num_ppo_epochs": 2}, max_steps=8)], PROMPTS)
    assert flops(cut, "train s") == pytest.approx(flops(whole, "train s"))
    assert flops(twice, "train s") == pytest.approx(2 * flops(whole, "train s"))
    for plan in (cut, twice):
        assert flops(plan, "sample s") == flops(whole, "sample s")
        assert flops(plan, "score s") == pytest.approx(flops(whole, "score s"))


def test_only_the_answers_that_are_learned_from_cost_training():
    tokens = {
        kind: planned([sampling({"type": kind, "num_generations": 8}, per_device_train_batch_size=16)], PROMPTS)["tokens"]
        for kind in ("grpo", "online_dpo", "best_of_n")
    }
    assert tokens["online_dpo"] == pytest.approx(tokens["grpo"] * 2 / 8, abs=1)
    assert tokens["best_of_n"] == pytest.approx(tokens["grpo"] / 8, abs=1)


@pytest.mark.parametrize("kind, items", [("dpo", PAIRS), ("kto", LABELLED)])
def test_the_reference_and_the_validation_are_passes_over_all_rows_with_their_heads(kind, items):
    found = [
        planned(
            [make_stage(objective=kind, name="s", method=LORA, max_steps=4, eval_steps=2, per_device_train_batch_size=size)],
            items,
            held_out=items,
        )
        for size in (12, 2)
    ]
    for name, passes in (("reference s", 2), ("validate s", 2)):
        assert flops(found[1], name) == pytest.approx(flops(found[0], name), rel=0.05)
        one_pass = flops(found[0], "train s") / 4 / 2  # of an update of all rows, a forward of its forward and backward
        assert flops(found[0], name) == pytest.approx(passes * one_pass * (2 if kind == "kto" else 1), rel=0.01)


def test_ktos_estimate_is_a_pass_over_as_many_rows_as_are_trained():
    stage = make_stage(objective="kto", name="s", method=LORA, max_steps=4, per_device_train_batch_size=4)
    plan = planned([stage], LABELLED)
    assert flops(plan, "estimate s") == pytest.approx(flops(plan, "train s") / 2)


def peak(*stages: Stage, **where) -> int:
    return planned(list(stages), PROMPTS, **where)["peak_memory_bytes"]


MODEL = 4 * sum(parameter.numel() for parameter in tiny_model("llama").parameters())
REWARD = {"name": "reward", "max_steps": 1, "objective": "sft"}  # what it learns does not count here
ADAPTER = 4 * 2 * 4 * (32 + 32)  # fp32, two layers of rank 4


def asking(*names: str, **settings) -> Stage:
    rewards = [{"type": "model", "model": name} for name in names]
    return sampling({"type": "grpo", "rewards": rewards or JUDGED["rewards"]}, **settings)


def test_a_fully_tuned_stage_that_samples_holds_a_copy_of_its_start(monkeypatch):
    without = peak(asking(method=FULL))
    monkeypatch.setattr(planning, "_models_beside", lambda *given: 0)
    assert without - peak(asking(method=FULL)) == MODEL


@pytest.mark.parametrize(
    "policy, method, start, more",
    [
        (LORA, LORA, None, ADAPTER),
        (LORA, FULL, None, MODEL),
        (FULL, LORA, None, MODEL + ADAPTER),
        (FULL, FULL, None, MODEL),
        (LORA, LORA, "other", MODEL + ADAPTER),
    ],
    ids=["shares the base", "is whole", "policy is whole", "both are whole", "is on another base"],
)
def test_a_reward_model_of_this_run_costs_its_adapter_or_a_model(policy, method, start, more):
    before = [make_stage(**REWARD | {"name": "other"}, method=FULL)] if start else []
    reward = make_stage(**REWARD, method=method, start_from=start)
    assert peak(*before, reward, asking("reward", method=policy)) - peak(*before, reward, asking(method=policy)) == more


def test_a_reward_model_from_elsewhere_costs_what_its_files_hold_and_a_base_where_it_cannot_share_one(tmp_path):
    tensor = {"a": torch.zeros(100_000)}
    for name, card in (("ours", "0" * 64), ("stranger", "1" * 64)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
        (tmp_path / name / "tunesmith.json").write_text(json.dumps({"base": {"sha256": card}}))
        save_file(tensor, tmp_path / name / "adapter_model.safetensors")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text("{}")
    save_file(tensor, tmp_path / "foreign" / "model.safetensors")
    size = (tmp_path / "foreign" / "model.safetensors").stat().st_size
    plain = peak(asking())
    assert peak(asking(str(tmp_path / "ours"))) - plain == size
    assert peak(asking(str(tmp_path / "stranger"))) - plain == size + MODEL
    assert peak(asking(str(tmp_path / "foreign"))) - plain == size
    assert peak(asking(str(tmp_path / "foreign"), str(tmp_path / "ours"))) - plain == 2 * size


def test_a_stage_whose_reward_models_do_not_fit_is_refused(monkeypatch):
    reward = make_stage(**REWARD, method=FULL)
    fits = peak(reward, asking())
    monkeypatch.setattr(planning, "resident_bytes", lambda: 0)
    monkeypatch.setattr(planning, "available_memory", lambda: fits + MODEL // 2)
    assert peak(reward, asking()) == fits
    with pytest.raises(DoesNotFit):
        peak(reward, asking("reward"))
