"""What a stage that samples holds at once: its answers, a reference, and reward models."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from tests.pipeline.test_planning import FULL, JUDGED, LORA, PROMPTS, machine, planned, sampling, session_of
from tests.toys import loaded, make_stage, tiny_model

from tunesmith import fitting
from tunesmith.errors import DoesNotFit
from tunesmith.models.roofline import model_shape
from tunesmith.recipe import Stage

__all__ = ["machine"]  # of the same speeds and memory


def peak(*stages: Stage) -> int:
    """Of the last one."""
    return sum(fitting.stage_footprint(session_of(list(stages), PROMPTS), model_shape(loaded(tiny_model("llama"))), stages[-1]).values())


MODEL = 4 * sum(parameter.numel() for parameter in tiny_model("llama").parameters())
REWARD = {"name": "reward", "max_steps": 1, "objective": "sft"}  # what it learns does not count here
ADAPTER = 4 * 2 * 4 * (32 + 32)  # fp32, two layers of rank 4


def asking(*names: str, **settings) -> Stage:
    rewards = [{"type": "model", "model": name} for name in names]
    return sampling({"type": "grpo", "rewards": rewards or JUDGED["rewards"]}, **settings)


def test_answers_take_room_only_beyond_what_the_update_after_them_does(monkeypatch):
    def parts(sampled: int) -> dict[str, int]:
        monkeypatch.setattr(fitting, "generation_bytes", lambda *given, **settings: sampled)
        stage = asking()
        return fitting.stage_footprint(session_of([stage], PROMPTS), model_shape(loaded(tiny_model("llama"))), stage)

    few = parts(0)
    update = few["activations"] + few["logits"]
    assert parts(update) == few
    assert parts(update + 7) == few | {"rollouts": 7}


def test_a_fully_tuned_stage_that_samples_holds_a_copy_of_its_start(monkeypatch):
    without = peak(asking(method=FULL))
    monkeypatch.setattr(fitting, "_models_beside", lambda *given: 0)
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
    reward = make_stage(**REWARD, method=LORA)
    monkeypatch.setattr(fitting, "available_memory", lambda: peak(reward, asking("reward")) - 1)
    planned([reward, asking()], PROMPTS)
    with pytest.raises(DoesNotFit, match="stage s needs"):
        planned([reward, asking("reward")], PROMPTS)
