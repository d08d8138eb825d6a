"""Several stages: where each starts, what it trains on, and what is refused before anything is trained."""

from __future__ import annotations

import hashlib
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tests.pipeline.helpers import conversations, read_json, recipe, stage, weights, write_rows

import tunesmith
from tunesmith.errors import DataRefused, RecipeError
from tunesmith.rundir import read_events

NO_EVALUATION = {"candidates": ["tuned"], "gates": []}
STILL = {"learning_rate": 1e-12, "max_steps": 1}  # a stage that leaves its start as it was, up to rounding


def adapter(run: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(run / "stages" / name / "model" / "adapter_model.safetensors")


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.fixture(scope="module")
def first(tiny, tmp_path_factory):
    """A run of one LoRA stage."""
    folder = tmp_path_factory.mktemp("first")
    method = {"type": "lora", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}
    return tunesmith.train(recipe(folder, tiny, stages=[stage(method=method)]), out=folder / "run").path


def test_a_stage_that_starts_from_an_earlier_one_continues_its_adapter_with_its_method(tiny, tmp_path):
    method = {"type": "lora", "r": 4, "target_modules": ["q_proj", "v_proj"]}
    made = recipe(tmp_path, tiny, stages=[stage("one", method=method), stage("two", start_from="one", **STILL), stage("three", **STILL)])
    run = tunesmith.train(made, out=tmp_path / "run").path
    one, two = adapter(run, "one"), adapter(run, "two")
    assert largest_difference(one, two) < 1e-9
    assert max(float(t.abs().max()) for name, t in one.items() if "lora_B" in name) > 1e-3
    assert max(float(t.abs().max()) for name, t in adapter(run, "three").items() if "lora_B" in name) < 1e-9  # a fresh one, on the base
    assert (run / "model").resolve() == run / "stages" / "three" / "model"
    resolved = yaml.safe_load((run / "recipe.yaml").read_text())["stages"]
    assert resolved[1]["method"] == resolved[0]["method"]
    assert resolved[0]["method"]["lora_alpha"] == 8
    assert resolved[2]["method"]["r"] == 16
    events = read_events(run)
    assert [event["name"] for event in events if event.get("event") == "phase"] == ["load", "data", "train one", "train two", "train three"]


@pytest.mark.parametrize("which", [".", "model", "stages/sft/model"])
def test_a_stage_starts_from_an_earlier_run_or_an_adapters_folder(tiny, first, which, tmp_path):
    made = recipe(tmp_path, tiny, stages=[stage(start_from=str(first / which), **STILL)])
    run = tunesmith.train(made, out=tmp_path / "run").path
    assert largest_difference(adapter(first, "sft"), adapter(run, "sft")) < 1e-9
    method = yaml.safe_load((run / "recipe.yaml").read_text())["stages"][0]["method"]
    assert (method["r"], method["lora_alpha"], method["target_modules"]) == (4, 6.0, ["q_proj", "v_proj"])


def test_full_stages_go_on_from_each_other_and_an_adapter_is_put_on_a_full_one(tiny, tmp_path):
    stages = [
        stage("one", method="full"),
        stage("two", start_from="one", **STILL),
        stage("three", start_from="two", method={"type": "lora", "r": 2}),
    ]
    run = tunesmith.run(recipe(tmp_path, tiny, stages=stages, evaluate=NO_EVALUATION), out=tmp_path / "run").path
    one, two = (load_file(run / "stages" / name / "model" / "model.safetensors") for name in ("one", "two"))
    assert largest_difference(one, two) < 1e-9
    assert largest_difference(one, load_file(tiny / "model.safetensors")) > 1e-4
    assert adapter(run, "three").keys()
    entry = read_json(run / "evaluation.json")["tasks"]["task"]["candidates"]["tuned"]
    assert entry["metrics"]["perplexity"]["value"] > 1
    assert tunesmith.Chat(run, max_new_tokens=2).ask("hello") is not None


@pytest.mark.parametrize(
    "stages, place, message",
    [
        ([stage(start_from="nowhere")], "stages.sft.start_from", "`nowhere` is no earlier stage, run or model folder"),
        ([stage("one", start_from="two"), stage("two")], "recipe", "stages.0.start_from: stage two comes no earlier than one"),
        ([stage("one", start_from="one")], "recipe", "stages.0.start_from: stage one comes no earlier than one"),
        ([stage("one"), stage("two", start_from="one", method="full")], "stages.two.method", "cannot start from an adapter"),
        ([stage("one"), stage("two", start_from="one", method={"type": "lora", "r": 3})], "stages.two.method.r", "an adapter of r 16"),
        ([stage("one"), stage("two", method={"type": "lora", "target_modules": ["q_prj"]})], "method.target_modules", "`q_prj` matches no"),
    ],
)
def test_a_start_or_method_that_cannot_be_is_refused_before_anything_is_trained(tiny, stages, place, message, tmp_path):
    with pytest.raises(RecipeError, match=message) as caught:
        tunesmith.run(recipe(tmp_path, tiny, stages=stages), out=tmp_path / "run")
    assert caught.value.where == place
    assert caught.value.exit_status == 2
    assert not (tmp_path / "run" / "stages").exists()


@pytest.mark.parametrize(
    "named, place",
    [
        ({"start_from": "nowhere"}, "stages.sft.start_from"),
        ({"objective": {"type": "grpo", "rewards": [{"type": "model", "model": "nowhere"}]}}, "stages.sft.objective"),
    ],
)
def test_a_model_that_is_not_there_is_named_before_a_folder_is_made_or_anything_is_read(tiny, named, place, tmp_path):
    (tmp_path / "nowhere").mkdir()
    (tmp_path / "nowhere" / "config.json").write_text("{}")  # and no weights
    stages = [stage(**named)]
    if "start_from" in named:
        stages[0]["start_from"] = str(tmp_path / "nowhere")
    with pytest.raises(RecipeError, match="is no earlier stage, run or model folder") as caught:
        tunesmith.run(recipe(tmp_path, tiny, stages=stages), out=tmp_path / "run")
    assert caught.value.where == place
    assert not (tmp_path / "run").exists()


def test_a_method_that_says_what_the_adapter_is_may_stand_there(tiny, first, tmp_path):
    stages = [stage(start_from=str(first), method={"type": "lora", "r": 4}, **STILL)]
    run = tunesmith.train(recipe(tmp_path, tiny, stages=stages), out=tmp_path / "run").path
    assert largest_difference(adapter(first, "sft"), adapter(run, "sft")) < 1e-9


def test_an_adapter_of_dropout_and_rank_stabilised_scale_is_continued_with_both(tiny, tmp_path):
    method = {"type": "lora", "r": 4, "use_rslora": True, "lora_dropout": 0.25}
    earlier = tunesmith.train(recipe(tmp_path, tiny, stages=[stage(method=method)]), out=tmp_path / "one").path
    run = tunesmith.train(recipe(tmp_path, tiny, stages=[stage(start_from=str(earlier), **STILL)]), out=tmp_path / "two").path
    resolved = yaml.safe_load((run / "recipe.yaml").read_text())["stages"][0]["method"]
    assert (resolved["use_rslora"], resolved["lora_dropout"]) == (True, 0.25)
    config = read_json(run / "model" / "adapter_config.json")
    assert (config["use_rslora"], config["lora_dropout"]) == (True, 0.25)


def test_a_stages_own_rows_are_what_it_trains_on_with_an_account_of_their_own(tiny, tmp_path):
    own = write_rows(tmp_path / "own.jsonl", [*conversations(12, seed=7), conversations(1, seed=7)[0], "no row"])
    stages = [stage("one"), stage("two", start_from="one", data={"train": str(own), "validation": 0.25})]
    made = recipe(tmp_path, tiny, stages=stages, evaluate=NO_EVALUATION)
    run = tunesmith.run(made, out=tmp_path / "run").path
    account = read_json(run / "data" / "two" / "ledger.json")
    assert account["rows_in"] == 14
    assert account["rows_dropped"] == {"duplicate": 1, "quarantined": 1}
    assert account["rows_trained"] + account["rows_held_out"] == 12
    assert read_json(run / "data" / "ledger.json")["rows_in"] == 20
    manifest = read_json(run / "manifest.json")
    assert manifest["stage_data"]["two"]["train"]["sha256"] == hashlib.sha256(own.read_bytes()).hexdigest()
    alone = recipe(tmp_path / "alone", tiny, stages=[stage("two", start_from=str(run / "stages" / "one" / "model"))])
    alone["data"] = {"train": str(own), "validation": 0.25}
    assert weights(tunesmith.train(alone, out=tmp_path / "again").path, "two") == weights(run, "two")
    resumed = tunesmith.run(made, out=run, resume=True)
    assert resumed.evaluation == read_json(run / "evaluation.json")
    assert weights(tunesmith.train(run / "recipe.yaml", out=tmp_path / "saved").path, "two") == weights(run, "two")


def test_test_rows_among_a_stages_own_rows_are_refused_though_the_stage_names_no_test_file(tiny, tmp_path):
    own = write_rows(tmp_path / "own.jsonl", [*conversations(6, seed=7), conversations(6, seed=1)[3]])
    made = recipe(tmp_path, tiny, stages=[stage("one"), stage("two", data={"train": str(own)})])
    with pytest.raises(DataRefused, match="1 of 7 training rows are also test rows"):
        tunesmith.run(made, out=tmp_path / "run")
    made["stages"][1]["data"]["test_overlap"] = "drop"
    run = tunesmith.train(made, out=tmp_path / "dropped").path
    assert read_json(run / "data" / "two" / "ledger.json")["rows_dropped"] == {"test_overlap": 1}


def test_stages_that_train_on_other_turns_of_the_same_rows_have_them_rendered_apart(tiny, tmp_path):
    turns = [
        {"messages": [message for row in pair for message in row["messages"]]}
        for pair in zip(conversations(9, seed=3), conversations(9), strict=True)
    ]
    stages = [stage("one"), stage("two", objective={"type": "sft", "train_on": "last"})]
    made = recipe(tmp_path, tiny, stages=stages)
    made["data"] = {"train": str(write_rows(tmp_path / "turns.jsonl", turns)), "validation": 0.0}
    run = tunesmith.train(made, out=tmp_path / "run").path
    everything, last = (read_json(run / "data" / where / "ledger.json")["tokens"] for where in (".", "two"))
    assert everything["total"] == last["total"]
    assert last["supervised"] < everything["supervised"]


def test_that_no_stage_trains_on_the_recipes_rows_is_said(tiny, tmp_path):
    own = write_rows(tmp_path / "own.jsonl", conversations(6, seed=7))
    plan = tunesmith.plan(recipe(tmp_path, tiny, stages=[stage(data={"train": str(own)})]))
    assert any("no stage trains on the rows of data.train" in note for note in plan["notes"])


@pytest.mark.parametrize("asked, how", [("load_best_model_at_end", True), ("early_stopping_patience", 1)])
def test_a_choice_by_held_out_rows_is_refused_where_the_share_holds_none_out(tiny, tmp_path, asked, how):
    pairs = [{"prompt": "p", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(12)]  # of one prompt, which stays on one side
    made = recipe(tmp_path, tiny, stages=[stage(objective="dpo", **{asked: how})])
    made["data"] = {"train": str(write_rows(tmp_path / "pairs.jsonl", pairs)), "validation": 0.2}
    with pytest.raises(RecipeError, match=f"{asked} needs held-out rows, and none were held out"):
        tunesmith.train(made, out=tmp_path / "run")


@pytest.mark.parametrize(
    ("dtype", "method", "refused"), [("bfloat16", "full", True), ("bfloat16", "lora", False), ("float32", "full", False)]
)
def test_a_later_stages_types_that_deepspeed_does_not_train_together_are_named_before_the_first_one_trains(
    tiny, tmp_path, dtype, method, refused
):
    pytest.importorskip("deepspeed")
    pairs = [
        {"chosen": row["messages"], "rejected": [row["messages"][0], {"role": "assistant", "content": "no"}]} for row in conversations(12)
    ]
    last = stage("reward", objective="reward", method=method, data={"train": str(write_rows(tmp_path / "pairs.jsonl", pairs))})
    made = recipe(
        tmp_path,
        tiny,
        stages=[stage(), last],
        evaluate=NO_EVALUATION,
        launch={"strategy": "zero2", "nproc_per_node": 2},
    )
    made["model"]["dtype"] = dtype
    with pytest.raises(RecipeError, match="one type in 16 bits") if refused else nullcontext():
        tunesmith.plan(made)
