"""What a run says of its rows, its plan and its frozen task: the ledger balances, and what is wrong is refused before training."""

from __future__ import annotations

import json

import pytest
import torch
from tests.pipeline.helpers import LABELS, conversations, read_json, recipe, stage, write_rows

import tunesmith
from tunesmith import fitting, planning
from tunesmith.errors import DataRefused, DoesNotFit, MissingFile, RecipeError
from tunesmith.models import load
from tunesmith.rundir import read_events

LONG = 40  # words


def long_rows(count: int):
    rows = conversations(count, seed=11)
    for number, row in enumerate(rows):
        row["messages"][0]["content"] = " ".join(f"w{number}x{i}" for i in range(LONG))
    return rows


def with_rows(tmp_path, tiny, rows, **data):
    made = recipe(tmp_path, tiny)
    made["data"] |= {"train": str(write_rows(tmp_path / "rows.jsonl", rows)), **data}
    return made


@pytest.mark.parametrize("policy", ["drop", "cut"])
def test_the_ledger_of_a_run_balances_over_every_fate_of_a_row(tiny, policy, tmp_path):
    rows = [
        *conversations(20),
        conversations(20)[4],
        "{torn",
        {"messages": [{"role": "user", "content": "unanswered"}]},
        conversations(6, seed=1)[2],
        *long_rows(3),
    ]
    made = with_rows(tmp_path, tiny, rows, test_overlap="drop", too_long=policy, max_length=90, validation=0.2)
    result = tunesmith.train(made, out=tmp_path / "run")
    ledger, data = read_json(result.path / "data" / "ledger.json"), result.path / "data"
    assert result.ledger == ledger
    dropped = {"duplicate": 1, "quarantined": 2, "test_overlap": 1, "too_long": 3}
    assert ledger["rows_dropped"] == dropped  # a cut would take all of a long row's answer, so it is dropped under both policies
    assert ledger["rows_in"] == len(rows) == ledger["rows_trained"] + ledger["rows_held_out"] + sum(ledger["rows_dropped"].values())
    assert ledger["rows_held_out"] == 4
    lines = [json.loads(line) for line in (data / "quarantine.jsonl").read_text().splitlines()]
    assert [(line["line"], line["path"]) for line in lines] == [(22, str(tmp_path / "rows.jsonl")), (23, str(tmp_path / "rows.jsonl"))]
    findings = {finding["check"]: finding for finding in read_json(data / "health.json")["findings"]}
    assert len(findings["too_long"]["row_ids"]) == len(set(findings["too_long"]["row_ids"])) == 3
    assert len(findings["duplicate"]["row_ids"]) == len(findings["duplicate"]["related_ids"]) == 1
    assert len(findings["test_overlap"]["row_ids"]) == 1
    assert set(findings["test_overlap"]["row_ids"] + findings["duplicate"]["row_ids"]).isdisjoint(findings["too_long"]["row_ids"])


def test_a_cut_keeps_what_fits_of_an_answer_and_counts_the_tokens_that_it_took(tiny, tmp_path):
    rows = conversations(10)
    rows[3]["messages"][1]["content"] = "x" * 200
    rows[8]["messages"][1]["content"] = "y" * 100
    made = with_rows(tmp_path, tiny, rows, too_long="cut", max_length=120, validation=0.0)
    whole = tunesmith.train(with_rows(tmp_path, tiny, rows, validation=0.0), out=tmp_path / "whole").ledger["tokens"]
    ledger = tunesmith.train(made, out=tmp_path / "run").ledger
    assert ledger["rows_trained"] == 10
    assert ledger["rows_dropped"] == {}
    assert ledger["tokens"]["truncated"] == whole["total"] - ledger["tokens"]["total"] > 100


def test_half_a_set_over_the_length_ends_with_a_status_or_with_the_rows_named(tiny, tmp_path):
    rows = conversations(10) + long_rows(10)
    with pytest.raises(DataRefused, match="10 of 20 rows are longer than 90 tokens") as caught:
        tunesmith.run(with_rows(tmp_path, tiny, rows, max_length=90), out=tmp_path / "refused")
    assert caught.value.exit_status == 3
    assert "rows.jsonl:11" in caught.value.where
    assert not (tmp_path / "refused" / "stages").exists()
    result = tunesmith.run(with_rows(tmp_path, tiny, rows, max_length=90, too_long="drop"), out=tmp_path / "dropped")
    (finding,) = [f for f in read_json(result.path / "data" / "health.json")["findings"] if f["check"] == "too_long"]
    assert len(set(finding["row_ids"])) == 10 == result.ledger["rows_dropped"]["too_long"]
    page = result.report.read_text()
    assert all(row_id in page for row_id in finding["row_ids"][:3])


def test_no_default_length_cuts_a_row_and_the_quantiles_are_there_before_the_first_step(tiny, tmp_path):
    rows = conversations(10) + long_rows(1)
    seen = []

    def report(event):
        if "loss" in event and not seen:
            seen.append(read_json(tmp_path / "run" / "data" / "health.json"))

    made = with_rows(tmp_path, tiny, rows, validation=0.0)
    result = tunesmith.train(made, out=tmp_path / "run", report=report)
    assert result.ledger["tokens"]["truncated"] == 0
    assert result.ledger["rows_trained"] == 11
    (lengths,) = [f["evidence"] for f in seen[0]["findings"] if f["check"] == "length_quantiles"]
    assert "p50" in lengths
    assert "max" in lengths
    over = long_rows(1)
    over[0]["messages"][0]["content"] *= 3  # over the model's context of 512
    with pytest.raises(DataRefused, match="longer than 512 tokens"):
        tunesmith.train(with_rows(tmp_path, tiny, rows + over), out=tmp_path / "over")


def test_every_candidate_answers_the_same_frozen_items_and_the_task_is_hashed_once(tiny, tmp_path):
    made = recipe(tmp_path, tiny, task={"labels": "auto", "metrics": ["exact_match", "macro_f1"]})
    made["evaluate"] |= {"candidates": ["zero_shot", "few_shot", "classical", "tuned"]}
    result = tunesmith.run(made, out=tmp_path / "run")
    task = result.evaluation["tasks"]["task"]
    assert task["n"] == 6
    assert set(task["candidates"]) == {"zero_shot", "few_shot", "classical", "tuned"}
    templates = {name: one["template_sha256"] for name, one in task["candidates"].items()}
    assert templates.pop("classical") is None
    assert len(set(templates.values())) == 1
    items = []
    for name in task["candidates"]:
        lines = [json.loads(line) for line in (result.path / "samples" / f"task.{name}.jsonl").read_text().splitlines()]
        items.append([(line["item_id"], line["prompt"], line["reference"]) for line in lines])
        assert {line["reference"] for line in lines} == set(LABELS)
    assert len(items[0]) == 6
    assert all(one == items[0] for one in items)
    other = recipe(tmp_path / "other", tiny, task={"labels": "auto", "metrics": ["exact_match", "macro_f1"]}, stages=[stage(max_steps=1)])
    assert tunesmith.run(other, out=tmp_path / "second").evaluation["tasks"]["task"]["hash"] == task["hash"]
    write_rows(tmp_path / "other" / "test.jsonl", conversations(6, seed=2))
    assert tunesmith.run(other, out=tmp_path / "third").evaluation["tasks"]["task"]["hash"] != task["hash"]


@pytest.mark.parametrize(
    "changed, place, message",
    [
        ({"evaluate": {"gates": [{"metric": "accuracy", "better_than": "few_shot"}]}}, None, "accuracy"),
        (
            {"evaluate": {"gates": [{"metric": "macro_f1", "better_than": "few_shot"}]}},
            "evaluate.gates.0.metric",
            "macro_f1 is not measured",
        ),
        (
            {"evaluate": {"gates": [{"metric": "rougeL", "task": "general", "better_than": "zero_shot"}]}},
            "evaluate.gates.0.metric",
            "perplexity",
        ),
        ({"task": {"metrics": ["field_accuracy"]}}, "task.metrics", "field_accuracy is not defined for free-text answers"),
        ({"task": {"labels": ["red"], "output_schema": "s.json"}}, "task", "not both"),
    ],
)
def test_a_gate_or_metric_that_cannot_be_is_refused_before_anything_is_trained(tiny, changed, place, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.json").write_text('{"type": "object", "properties": {"a": {"type": "string"}}}')
    with pytest.raises(RecipeError, match=message) as caught:
        tunesmith.run(recipe(tmp_path, tiny, **changed), out=tmp_path / "run")
    assert place is None or caught.value.where == place
    assert not (tmp_path / "run" / "stages").exists()


def test_references_that_break_the_schema_are_refused_before_anything_is_trained(tiny, tmp_path):
    (tmp_path / "schema.json").write_text('{"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}')
    made = recipe(tmp_path, tiny, task={"output_schema": str(tmp_path / "schema.json")})
    with pytest.raises(DataRefused, match=r"do not satisfy the output schema: r[0-9a-f]{12} \(.*test\.jsonl:1\)"):
        tunesmith.run(made, out=tmp_path / "run")
    assert not (tmp_path / "run" / "stages").exists()
    assert (tmp_path / "run" / "data" / "ledger.json").exists()


@pytest.mark.parametrize(
    "key, value",
    [
        ("data.train", "no.jsonl"),
        ("data.test", "no.jsonl"),
        ("data.validation", "no.jsonl"),
        ("evaluate.general", "no.jsonl"),
        ("task.output_schema", "no.json"),
    ],
)
def test_a_missing_file_is_named_before_the_model_is_loaded_and_makes_no_run_directory(tiny, key, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = recipe(tmp_path, tmp_path / "no-such-model")
    with pytest.raises(MissingFile, match=r"no\.json"):
        tunesmith.run(made, sets=[f"{key}={value}"], out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_rows_of_the_general_set_that_were_trained_on_or_cannot_be_used_are_left_out_and_named(tiny, tmp_path):
    general = write_rows(tmp_path / "general.jsonl", [conversations(20)[0], *conversations(3, seed=9), "no row"])
    made = recipe(tmp_path, tiny, evaluate={"general": str(general), "candidates": ["zero_shot", "tuned"], "gates": []})
    made["data"] |= {"validation": 0.0, "max_rejected": 0.5}
    evaluation = tunesmith.run(made, out=tmp_path / "run").evaluation
    assert evaluation["tasks"]["general"]["n"] == 3
    assert "1 of 4 rows of the general set are training rows, or nearly, and were left out" in evaluation["notes"]
    assert any("a row of the general set cannot be used: line 5" in note for note in evaluation["notes"])
    own = write_rows(tmp_path / "own.jsonl", conversations(3, seed=9)[:2] + conversations(6, seed=10))
    made["stages"].append(stage("two", data={"train": str(own), "validation": 0.0}))
    assert tunesmith.run(made, out=tmp_path / "two").evaluation["tasks"]["general"]["n"] == 1
    write_rows(general, conversations(20)[:2])
    with pytest.raises(RecipeError, match="no row of the general set is new"):
        tunesmith.run(made, out=tmp_path / "three")


def test_plan_json_holds_what_was_predicted_and_what_the_run_took(tiny, tmp_path):
    made = recipe(tmp_path, tiny, stages=[stage(logging_steps=2, max_steps=5), stage("two", start_from="sft")])
    result = tunesmith.run(made, out=tmp_path / "run")
    plan = read_json(result.path / "plan.json")
    assert plan == result.plan
    for part in ("predicted", "measured"):
        assert plan[part]["peak_memory_bytes"] > 0
        assert plan[part]["seconds"] > 0
        assert {"tokens", "bound_by", "phases"} <= plan[part].keys()
    events = read_events(result.path)
    assert plan["measured"]["tokens"] == sum(event["tokens"] for event in events if event.get("event") == "stage_finished") > 0
    assert abs(plan["measured"]["tokens"] / plan["predicted"]["tokens"] - 1) < 0.2
    assert plan["measured"]["seconds"] == pytest.approx(sum(event["seconds"] for event in events if event.get("event") == "phase"))
    assert {phase["name"] for phase in plan["predicted"]["phases"]} >= {"train sft", "train two", "evaluate zero_shot", "evaluate tuned"}
    both = {row["name"] for row in plan["compared"] if row["error"] is not None}
    assert both >= {
        "peak_memory_bytes",
        "seconds",
        "tokens",
        "load",
        "train sft",
        "save sft",
        "train two",
        "evaluate zero_shot",
        "evaluate tuned",
    }


def test_a_plan_over_the_machines_memory_is_refused_before_anything_is_trained(tiny, tmp_path, monkeypatch):
    with monkeypatch.context() as small:
        small.setattr(fitting, "memory_room", lambda session: 0)
        small.setattr(planning, "memory_room", lambda session: 0)
        with pytest.raises(DoesNotFit, match="GB of memory") as caught:
            tunesmith.run(recipe(tmp_path, tiny), out=tmp_path / "run")
    assert caught.value.exit_status == 4
    assert not (tmp_path / "run" / "stages").exists()
    tunesmith.train(recipe(tmp_path, tiny), out=tmp_path / "run")  # the folder of a refused run is free


def test_a_corrected_recipe_takes_the_folder_of_the_refused_one_and_nothing_of_it_counts(tiny, tmp_path):
    wrong = recipe(tmp_path, tiny)
    wrong["stages"][0]["method"] = {"type": "lora", "target_modules": ["no_such"]}
    with pytest.raises(RecipeError, match="no_such"):
        tunesmith.train(wrong, sets=["data.validation=0.3"], out=tmp_path / "run")
    assert [event["name"] for event in read_events(tmp_path / "run")] == ["load", "data"]
    result = tunesmith.train(recipe(tmp_path, tiny), out=tmp_path / "run")
    fresh = tunesmith.train(recipe(tmp_path, tiny), out=tmp_path / "fresh")
    assert result.ledger == fresh.ledger
    assert [event.get("name") for event in read_events(result.path)] == [event.get("name") for event in read_events(fresh.path)]
    adapter = "model/adapter_model.safetensors"
    assert (result.path / adapter).read_bytes() == (fresh.path / adapter).read_bytes()


TWICE, TENFOLD = "no bfloat16 arithmetic: the model computes in float32", "no float16 arithmetic: expect ten times the time"


@pytest.mark.parametrize(
    "fast, dtype, slow", [(True, "float32", None), (False, "float32", TWICE), (True, "float16", None), (False, "float16", TENFOLD)]
)
def test_a_processor_that_is_slow_in_the_runs_dtype_is_named_beforehand(tiny, fast, dtype, slow, tmp_path, monkeypatch):
    monkeypatch.setattr(load, "has_fast", lambda kind: fast or kind == torch.float32)
    told = []
    tunesmith.train(recipe(tmp_path, tiny), sets=[f"model.dtype={dtype}"], out=tmp_path / "run", report=told.append)
    (plan,) = [event for event in told if event.get("event") == "plan"]
    kinds = [event.get("event") for event in told]
    assert kinds.index("plan") < kinds.index("stage_finished")
    for notes in (plan["notes"], read_json(tmp_path / "run" / "plan.json")["predicted"]["notes"]):
        found = [note for note in notes if "arithmetic" in note]
        assert [slow in note for note in found] == [True] if slow else found == []
    (logged,) = [event["notes"] for event in read_events(tmp_path / "run") if event.get("event") == "notes"]
    assert logged == plan["notes"]
    assert any("20 of 20 rows are messages" in note for note in logged)


def test_plan_writes_nothing(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = recipe(tmp_path, tiny)
    before = sorted(path.name for path in tmp_path.iterdir())
    plan = tunesmith.plan(made)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert plan["ledger"]["rows_in"] == 20
    assert "<|im_start|>" in plan["example"].plain
