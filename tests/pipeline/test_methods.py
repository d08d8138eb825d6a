"""Methods through the whole pipeline: a quantised base from training to answers, later stages of their own kind, refusals in time."""

from __future__ import annotations

import math

import pytest
from safetensors.torch import load_file
from tests.pipeline.helpers import conversations, read_json, recipe, stage, weights, write_rows

import tunesmith
from tunesmith.errors import RecipeError
from tunesmith.rundir import read_events

PISSA = {"type": "lora", "r": 2, "init_lora_weights": "pissa", "loraplus_lr_ratio": 4.0}
FEW = {"candidates": ["zero_shot", "tuned"], "gates": []}


def preferring(folder):
    """A DPO stage, with pairs."""
    rows = [
        {"prompt": row["messages"][:1], "chosen": row["messages"][1:], "rejected": [{"role": "assistant", "content": "mauve"}]}
        for row in conversations(12, seed=5)
    ]
    data = {"train": str(write_rows(folder / "pairs.jsonl", rows)), "validation": 0}
    return stage("dpo", objective="dpo", start_from="sft", data=data, warmup_steps=0)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_pissa_on_a_quantised_base_trains_is_gone_on_with_by_dpo_and_answers(tiny, tmp_path, quantization):
    made = recipe(tmp_path, tiny, stages=[stage(method=PISSA), preferring(tmp_path)], evaluate=FEW)
    made["model"]["quantization"] = quantization
    done = tunesmith.run(made, out=tmp_path / "run")
    losses = [event["loss"] for event in read_events(done.path) if event.get("stage") == "dpo" and "loss" in event]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    files = [load_file(done.path / "stages" / name / "model" / "adapter_model.safetensors") for name in ("sft", "dpo")]
    assert files[0].keys() == files[1].keys()
    assert {tensor.shape[0] for name, tensor in files[1].items() if "lora_A" in name} == {4}
    card = read_json(done.path / "stages" / "dpo" / "model" / "tunesmith.json")
    assert (card["quantization"], card["method"]["init_lora_weights"], card["method"]["r"]) == (quantization, "pissa", 2)
    assert read_json(done.path / "evaluation.json")["tasks"]["task"]["candidates"]["tuned"]["metrics"]
    again = tunesmith.train(done.path / "recipe.yaml", out=tmp_path / "again").path
    assert weights(again, "dpo") == weights(done.path, "dpo")


@pytest.mark.parametrize("method", ["full", {"type": "partial", "last_layers": 1}])
def test_a_whole_model_on_a_quantised_base_is_refused_before_anything_is_trained(tiny, tmp_path, method):
    made = recipe(tmp_path, tiny, stages=[stage(), stage("two", method=method)])
    made["model"]["quantization"] = "nf4"
    with pytest.raises(RecipeError, match="in too few bits for an update"):
        tunesmith.run(made, out=tmp_path / "run")
    assert not (tmp_path / "run" / "stages").exists()


def test_a_rate_that_was_derived_is_in_the_recipe_and_said(tiny, tmp_path):
    said = tunesmith.plan(recipe(tmp_path, tiny, stages=[stage(method=PISSA, learning_rate=None), stage("two")]))
    assert "learning_rate: 0.00013" in said["recipe"]  # pissa's, by LoRA+'s ratio
    assert [note for note in said["notes"] if "learning rate" in note] == [
        "stage sft: learning rate 0.00013, derived for lora, sft and a model 32 wide"
    ]
