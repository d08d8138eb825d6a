"""A run that is broken off anywhere and resumed ends as the unbroken one, and does nothing twice."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import yaml
from tests.cli_tools import call
from tests.faults.harness import Child, in_child, tree
from tests.pipeline.helpers import announced, read_json, recipe, stage, weights, write_rows

import tunesmith
from tunesmith import progress
from tunesmith.errors import RecipeError
from tunesmith.rundir import read_events

TWO_STAGES = [stage("one"), stage("two", start_from="one")]


def die_at(number: int):
    """A report function that kills this process when the evaluation begins its n-th unit."""
    seen = []

    def report(event):
        seen.extend(announced([event]))
        if len(seen) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return report


def die_after(name: str):
    """A report function that kills this process when a phase has ended."""

    def report(event):
        if event.get("event") == "phase" and event["name"] == name:
            os.kill(os.getpid(), signal.SIGKILL)

    return report


@pytest.fixture(scope="module")
def given(tiny, tmp_path_factory):
    """A recipe of two stages, with a guard set, and its unbroken run: (recipe, run directory, what was announced)."""
    folder = tmp_path_factory.mktemp("resume")
    general = folder / "general.jsonl"
    row = {"messages": [{"role": "user", "content": "what is the capital of peru"}, {"role": "assistant", "content": "lima"}]}
    general.write_text(json.dumps(row) + "\n")
    made = recipe(folder, tiny, stages=TWO_STAGES, evaluate={"general": str(general)})
    events = []
    assert tunesmith.run(made, out=folder / "run", report=events.append).verdict in ("PASS", "FAIL", "NOT MEASURED")
    return made, folder / "run", announced(events)


def results(run: Path) -> dict[str, bytes]:
    """What must not depend on how often a run was broken off."""
    lasting = {name: content for name, content in tree(run).items() if name.startswith(("samples/", "data/", "stages/"))}
    state = {
        name for name in lasting if "/checkpoints/" in name or name.endswith("manifest.json")
    }  # these hold the time that training took
    return {name: content for name, content in lasting.items() if name not in state} | {
        "evaluation.json": (run / "evaluation.json").read_bytes()
    }


def test_a_run_killed_in_any_unit_of_its_evaluation_ends_byte_equal_and_scores_nothing_twice(given, tmp_path):
    made, unbroken, units = given
    assert len(units) == len(set(units)) == 9
    for number in (1, 5, 9):
        path = tmp_path / str(number)
        assert in_child(lambda path=path, number=number: tunesmith.run(made, out=path, report=die_at(number))).signal == signal.SIGKILL
        assert not (path / "evaluation.json").exists()
        finished = len(list((path / "evaluation").glob("*.json")))
        events = []
        tunesmith.run(made, out=path, resume=True, report=events.append)
        assert announced(events) == units[number - 1 :]
        assert finished == number - 1
        assert not any("loss" in event for event in events)
        assert results(path) == results(unbroken)


@pytest.mark.parametrize("phase", ["data", "train one", "train two", "evaluate"])
def test_a_run_killed_between_two_phases_ends_byte_equal(given, phase, tmp_path):
    made, unbroken, units = given
    assert in_child(lambda: tunesmith.run(made, out=tmp_path / "run", report=die_after(phase))).signal == signal.SIGKILL
    events = []
    tunesmith.run(made, out=tmp_path / "run", resume=True, report=events.append)
    assert results(tmp_path / "run") == results(unbroken)
    steps = [(event["stage"], event["step"]) for event in read_events(tmp_path / "run") if "loss" in event]
    assert steps == [(name, step) for name in ("one", "two") for step in (1, 2, 3)]
    assert announced(events) == ([] if phase == "evaluate" else units)


def test_a_finished_run_resumed_does_nothing_and_gives_the_same_result(given):
    made, unbroken, _ = given
    before, known = results(unbroken), read_json(unbroken / "evaluation.json")
    events = []
    again = tunesmith.run(made, out=unbroken, resume=True, report=events.append)
    assert results(unbroken) == before
    assert again.evaluation == known
    assert again.plan["measured"]["tokens"] == again.plan["predicted"]["tokens"] > 0
    assert not announced(events)
    assert not any("loss" in event for event in events)


def test_the_saved_recipe_repeats_the_run(given, tmp_path):
    _, unbroken, _ = given
    assert tunesmith.run(unbroken / "recipe.yaml", out=tmp_path / "again").verdict == read_json(unbroken / "evaluation.json")["verdict"]
    assert results(tmp_path / "again") == results(unbroken)
    first, second = (yaml.safe_load((run / "recipe.yaml").read_text()) for run in (unbroken, tmp_path / "again"))
    assert first | {"output": None} == second | {"output": None}


@pytest.mark.parametrize(
    ("sets", "changed"),
    [
        (["stages.1.learning_rate=3e-3"], r" \(learning_rate: .*, now 0.003\)$"),
        (["seed=5"], r" \(seed: \d+, now 5\)$"),
        (["data.validation=0.3"], r" \(data.validation: .*, now 0.3\)$"),
        (["stages.0.method={type: lora, r: 16, lora_alpha: 7}"], r" \(method\.lora_alpha: \d+(\.0)?, now 7(\.0)?\)$"),
    ],
)
def test_a_result_trained_with_other_settings_or_data_is_refused_and_the_run_directory_left_as_it_was(given, sets, changed):
    made, unbroken, _ = given
    before = {name: content for name, content in tree(unbroken).items() if not name.startswith("data/tokens/")}
    for verb in (
        lambda: tunesmith.run(made, sets=sets, out=unbroken, resume=True),
        lambda: tunesmith.evaluate(made, sets=sets, out=unbroken),
    ):
        with pytest.raises(RecipeError, match="trained with other settings or data") as caught:
            verb()
        assert re.search(changed, caught.value.what)
    after = tree(unbroken)
    assert [name for name in before if name != "events.jsonl" and after[name] != before[name]] == []


def test_a_checkpoint_of_other_settings_is_refused_by_their_names_and_the_run_directory_left_as_it_was(given, tmp_path):
    made, unbroken, _ = given
    path = tmp_path / "run"

    def stopping(event):
        if event.get("step") == 2 and "loss" in event:
            os.kill(os.getpid(), signal.SIGINT)

    assert in_child(lambda: tunesmith.run(made, out=path, report=stopping)).status == 130
    assert (path / "stages" / "one" / "checkpoints" / "step-2").is_dir()
    assert not (path / "stages" / "one" / "model").exists()
    before = {name: content for name, content in tree(path).items() if not name.startswith("data/tokens/")}
    with pytest.raises(RecipeError, match="stage one was trained with other settings or data") as caught:
        tunesmith.run(made, sets=["stages.0.learning_rate=3e-3"], out=path, resume=True)
    assert re.search(r" \(learning_rate: 0.01, now 0.003\)$", caught.value.what)
    assert caught.value.where.endswith("step-2")
    after = tree(path)
    assert [name for name in before if name != "events.jsonl" and after[name] != before[name]] == []
    tunesmith.run(made, out=path, resume=True)
    assert results(path) == results(unbroken)


def test_rows_that_are_not_what_they_were_are_named_as_what_changed(tiny, tmp_path):
    made = recipe(tmp_path, tiny, stages=[stage("one")])
    tunesmith.train(made, out=tmp_path / "run")
    train = Path(made["data"]["train"])
    rows = [json.loads(line) for line in train.read_text().splitlines()]
    rows[0]["messages"][0]["content"] += " now"
    write_rows(train, rows)
    with pytest.raises(RecipeError) as caught:
        tunesmith.train(made, out=tmp_path / "run", resume=True)
    assert caught.value.what == "stage one was trained with other settings or data (data.train: other bytes)"


def test_a_number_of_updates_that_is_now_left_open_is_named_where_nothing_else_differs(tiny, tmp_path):
    made = recipe(tmp_path, tiny, stages=[{key: value for key, value in stage("one").items() if key != "max_steps"}])
    tunesmith.train(made, sets=["stages.0.max_steps=1"], out=tmp_path / "run")
    with pytest.raises(RecipeError) as caught:
        tunesmith.train(made, out=tmp_path / "run", resume=True)
    assert re.search(r"other settings or data \(max_steps: 1, now \d+", caught.value.what)


def test_evaluate_after_train_gives_what_run_gives(given, tmp_path):
    made, unbroken, units = given
    trained = tunesmith.train(made, out=tmp_path / "run")
    assert trained.evaluation is None
    assert not (tmp_path / "run" / "evaluation.json").exists()
    events = []
    tunesmith.evaluate(made, out=tmp_path / "run", report=events.append)
    assert announced(events) == units
    assert results(tmp_path / "run") == results(unbroken)


def test_a_plan_that_foresaw_no_evaluation_is_held_against_none(given, tmp_path):
    made, unbroken, _ = given
    trained = tunesmith.train(made, out=tmp_path / "run").plan
    evaluated = tunesmith.evaluate(made, out=tmp_path / "run").plan
    assert evaluated["compared"] == trained["compared"]
    assert evaluated["measured"]["seconds"] > trained["measured"]["seconds"]
    whole = read_json(unbroken / "plan.json")  # of `run`, which foresaw all
    assert whole["compared"][1]["measured"] == whole["measured"]["seconds"]


def test_a_signal_during_the_evaluation_exits_130_and_the_resumed_run_is_byte_equal(given, tmp_path):
    made, unbroken, units = given
    path = tmp_path / "run"
    tunesmith.train(made, out=path)
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(made))
    reached, reach = os.pipe()

    def slow_at_the_third_unit():
        show, seen = progress.Display.__call__, []

        def slow(self, event):
            show(self, event)
            seen.append(event.get("event"))
            if event.get("event") == "evaluating" and seen.count("evaluating") == 3:
                os.write(reach, b"!")
                time.sleep(30)

        progress.Display.__call__ = slow
        return call("run", file, "--out", path, "--resume", "--json")

    child = Child(slow_at_the_third_unit)
    os.read(reached, 1)
    os.kill(child.pid, signal.SIGTERM)
    status, _, told = child.wait().result
    assert status == 130, told
    assert told.count('"evaluating"') == 3
    assert "SIGTERM" in told.splitlines()[-1]
    assert "--resume" in told.splitlines()[-1]
    events = []
    tunesmith.run(made, out=path, resume=True, report=events.append)
    assert announced(events) == units[2:]
    assert results(path) == results(unbroken)


def test_a_signal_that_a_library_swallowed_still_stops_the_evaluation_at_its_next_unit(given, tmp_path):
    made, _, _ = given

    def swallowed():
        def report(event):
            if announced([event]):
                try:
                    os.kill(os.getpid(), signal.SIGTERM)
                except Exception:  # what a library might do
                    return

        return tunesmith.run(made, out=tmp_path / "run", report=report).verdict

    ended = in_child(swallowed)
    assert (ended.status, ended.result["error"]) == (130, "Interrupted")


@pytest.mark.parametrize("gone", [False, True])
def test_a_stage_goes_on_when_the_one_it_starts_from_has_to_be_trained_again(gone, given, tmp_path):
    made, unbroken, _ = given
    path = tmp_path / "run"

    def stopping(event):
        if event.get("stage") == "two" and event.get("step") == 2 and "loss" in event:
            os.kill(os.getpid(), signal.SIGINT)

    assert in_child(lambda: tunesmith.train(made, out=path, report=stopping)).status == 130
    (file,) = (path / "stages" / "one" / "model").glob("*.safetensors")
    if gone:
        shutil.rmtree(file.parent)
    else:
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    tunesmith.train(made, out=path, resume=True)
    assert [weights(path, name) for name in ("one", "two")] == [weights(unbroken, name) for name in ("one", "two")]
    begun = [event["step"] for event in read_events(path) if "loss" in event and event["stage"] == "two"]
    assert begun == [1, 2, 3], "its own checkpoint was taken"


def test_a_damaged_result_is_trained_again_from_its_checkpoint(given, tmp_path):
    made, unbroken, _ = given
    path = tmp_path / "run"
    tunesmith.train(made, out=path)
    (file,) = (path / "stages" / "two" / "model").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    tunesmith.train(made, out=path, resume=True)
    assert weights(path, "two") == weights(unbroken, "two")
    assert [event["stage"] for event in read_events(path) if event.get("event") == "result_refused"] == ["two"]
