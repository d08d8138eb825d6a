"""A result is used only as it was saved; and what chat and a rerun need is in the run directory."""

from __future__ import annotations

import errno
import os
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tests.pipeline.helpers import conversations, read_json, recipe, stage, write_rows

import tunesmith
from tunesmith import chat as chat_module
from tunesmith.errors import CheckpointError, DataRefused, RecipeError
from tunesmith.models.result import require_unaltered
from tunesmith.rundir import read_events, storage


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """(a recipe that leaves open what can be derived, its finished run)."""
    folder = tmp_path_factory.mktemp("altered")
    made = recipe(folder, tiny, task={"labels": "auto"}, evaluate={"max_new_tokens": None})
    return made, tunesmith.run(made, out=folder / "run").path


def with_noise(run):
    """Puts noise of the same names, shapes and size in place of the tuned weights."""
    file = run / "stages" / "sft" / "model" / "adapter_model.safetensors"
    save_file({name: torch.randn_like(tensor) for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})


def test_weights_that_are_not_those_saved_are_refused_by_chat_evaluate_and_a_stage_that_starts_from_them(finished, tiny, tmp_path):
    made, run = finished
    shutil.copytree(run, tmp_path / "run", symlinks=True)
    with_noise(tmp_path / "run")
    before = (tmp_path / "run" / "model" / "manifest.json").read_bytes()
    starting = recipe(tmp_path / "next", tiny, stages=[stage("next", start_from=str(tmp_path / "run"))])
    for use in (
        lambda: tunesmith.Chat(tmp_path / "run"),
        lambda: tunesmith.evaluate(made, out=tmp_path / "run"),  # though every score is there already
        lambda: tunesmith.train(starting, out=tmp_path / "next" / "run"),
    ):
        with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors was altered"):
            use()
    assert (tmp_path / "run" / "model" / "manifest.json").read_bytes() == before  # and not sealed anew


def test_a_folder_of_another_tool_has_nothing_to_be_checked_against_and_a_result_without_its_manifest_is_refused(finished, tmp_path):
    model = tmp_path / "model"
    shutil.copytree((finished[1] / "model").resolve(), model)
    (model / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        require_unaltered(model)
    (model / "tunesmith.json").unlink()
    require_unaltered(model)


def test_the_saved_recipe_holds_the_derived_answer_length_and_labels_and_chat_goes_by_it(finished, tmp_path):
    _, run = finished
    saved = yaml.safe_load((run / "recipe.yaml").read_text())
    entry = read_json(run / "evaluation.json")["tasks"]["task"]["candidates"]["tuned"]
    assert saved["evaluate"]["max_new_tokens"] == entry["max_new_tokens"] < 20
    assert saved["task"]["labels"] == ["blue", "green", "red"]
    assert tunesmith.Chat(run).max_new_tokens == entry["max_new_tokens"]


def test_labels_stay_auto_where_given_ones_would_refuse_the_rerun(tiny, tmp_path):
    made = recipe(tmp_path, tiny, task={"labels": "auto"})
    rows = conversations(6, seed=1)
    rows[0]["messages"][1]["content"] = "mauve"
    write_rows(tmp_path / "test.jsonl", rows)
    run = tunesmith.train(made, out=tmp_path / "run").path
    assert yaml.safe_load((run / "recipe.yaml").read_text())["task"]["labels"] == "auto"
    tunesmith.train(run / "recipe.yaml", out=tmp_path / "again")


def test_chat_runs_no_remote_code_unless_it_is_asked_to_whatever_the_run_says(finished, tmp_path, monkeypatch):
    shutil.copytree(finished[1], tmp_path / "run", symlinks=True)
    saved = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    saved["model"]["trust_remote_code"] = True
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(saved))
    seen, load = [], chat_module.load_model
    monkeypatch.setattr(chat_module, "load_model", lambda section: seen.append(section.trust_remote_code) or load(section))
    tunesmith.Chat(tmp_path / "run")
    tunesmith.Chat(tmp_path / "run", trust_remote_code=True)
    assert seen == [False, True]


def test_a_finished_run_that_is_resumed_took_no_more_time(finished):
    made, run = finished
    before = read_json(run / "plan.json")["measured"]
    logged = len(read_events(run))
    assert tunesmith.run(made, out=run, resume=True).plan["measured"]["seconds"] == before["seconds"] > 0
    assert len(read_events(run)) > logged
    assert read_json(run / "plan.json")["measured"]["phases"] == before["phases"]


def test_another_recipe_for_a_finished_run_is_a_usage_error(finished):
    made, run = finished
    with pytest.raises(RecipeError, match="trained with other settings") as caught:
        tunesmith.run(made, sets=["seed=9"], out=run, resume=True)
    assert caught.value.exit_status == 2


def odd_rows():
    """A row with tools, which chatml does not write, and one over the model's context of 512."""
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}
    with_tools, long = conversations(2, seed=5)
    long["messages"][0]["content"] = "long " * 300
    return [with_tools | {"tools": [tool]}, long]


def test_test_and_general_rows_that_cannot_be_asked_are_skipped_with_the_reason_and_the_rest_is_measured(tiny, tmp_path):
    general = write_rows(tmp_path / "general.jsonl", [*conversations(3, seed=9), *odd_rows()])
    made = recipe(tmp_path, tiny, evaluate={"general": str(general)})
    write_rows(tmp_path / "test.jsonl", [*conversations(6, seed=1), *odd_rows()])
    evaluation = tunesmith.run(made, out=tmp_path / "run").evaluation
    for name, n in (("task", 6), ("general", 3)):
        task = evaluation["tasks"][name]
        assert task["n"] == n
        assert sorted(task["skipped"]) == [
            "it leaves no room for its answer in the model's context of 512 tokens",
            "the template does not write the row's tools",
        ]
        assert any(f"2 of {n + 2} items of {name} cannot be asked" in note for note in evaluation["notes"])


@pytest.mark.parametrize("part", ["test", "general"])
def test_a_set_of_which_no_row_can_be_asked_is_refused_before_anything_is_trained(tiny, part, tmp_path):
    odd = write_rows(tmp_path / "odd.jsonl", odd_rows())
    made = recipe(tmp_path, tiny)
    made["data" if part == "test" else "evaluate"][part] = str(odd)
    with pytest.raises(DataRefused, match="2 of 2 items") as caught:
        tunesmith.run(made, out=tmp_path / "run")
    assert caught.value.where == ("data.test" if part == "test" else "evaluate.general")
    assert not (tmp_path / "run" / "stages").exists()


def test_rows_of_the_general_set_that_are_nearly_training_rows_are_left_out(tiny, tmp_path):
    rows = conversations(3, seed=9)
    trained = "please tell me in one short word what the colour of this old red garden bench beside the pond is"
    rows[0]["messages"][0]["content"] = trained + " now"
    general = write_rows(tmp_path / "general.jsonl", rows)
    made = recipe(tmp_path, tiny, evaluate={"general": str(general), "candidates": ["tuned"], "gates": []})
    train = conversations(20)
    train[0]["messages"][0]["content"] = trained
    write_rows(tmp_path / "train.jsonl", train)
    made["data"]["validation"] = 0.0
    assert tunesmith.run(made, out=tmp_path / "run").evaluation["tasks"]["general"]["n"] == 2


def test_a_file_system_without_links_gets_the_card_beside_copies(tiny, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    run = tunesmith.train(recipe(tmp_path, tiny), out=tmp_path / "run").path
    assert (run / "model" / "README.md").is_file()
    require_unaltered(run / "model")
    assert tunesmith.Chat(run, max_new_tokens=2).ask("hello") is not None


def test_the_link_to_the_result_is_on_the_disk_before_the_run_goes_on(tiny, tmp_path, monkeypatch):
    calls, rename, fsync = [], storage.rename, storage.fsync
    monkeypatch.setattr(storage, "rename", lambda source, target: calls.append(("rename", target)) or rename(source, target))
    monkeypatch.setattr(storage, "fsync", lambda descriptor, path: calls.append(("fsync", path)) or fsync(descriptor, path))
    run = tunesmith.train(recipe(tmp_path, tiny), out=tmp_path / "run").path
    assert (run / "model").is_symlink()
    assert calls[calls.index(("rename", run / "model")) + 1] == ("fsync", run)
