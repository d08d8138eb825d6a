"""A grid of settings over one rendering of the data, compared on one page; chosen by validation loss, never by test rows."""

from __future__ import annotations

import html
import json
import os
import signal
import statistics

import pytest
import yaml
from tests.cli_tools import call
from tests.pipeline.helpers import read_json, recipe, stage

import tunesmith
from tunesmith import sweep as sweep_runs
from tunesmith.errors import Interrupted, MissingFile, NonFinite, OutputInUse, RecipeError
from tunesmith.rundir import read_events
from tunesmith.sweep import _other_measures, _summary, parse_axis

AXES = ["stages.0.learning_rate=1e-2,1e-7", "seed=0,1"]
QUICK = {"candidates": ["zero_shot", "tuned"], "gates": [{"metric": "exact_match", "better_than": "zero_shot"}]}


def given(folder, tiny, **changed):
    return recipe(folder, tiny, stages=[stage()], evaluate=QUICK, **changed)


def of_stages(*stages):
    """A recipe, which is not run."""
    return tunesmith.load_recipe({"name": "x", "model": {"name": "m"}, "data": {"train": "t.jsonl"}, "stages": list(stages)})


@pytest.fixture(scope="module")
def swept(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    return sweep_runs(given(folder, tiny), AXES, out=folder / "sweep")


def test_every_combination_is_a_whole_run_of_its_own(swept):
    names = [run["name"] for run in swept.runs]
    assert names == [
        "0.learning_rate=1e-2,seed=0",
        "0.learning_rate=1e-2,seed=1",
        "0.learning_rate=1e-7,seed=0",
        "0.learning_rate=1e-7,seed=1",
    ]
    for run in swept.runs:
        folder = swept.path / run["name"]
        resolved = tunesmith.load_recipe(folder / "recipe.yaml")
        assert resolved.stages[0].learning_rate == float(run["settings"]["stages.0.learning_rate"])
        assert resolved.seed == int(run["settings"]["seed"])
        assert run["verdict"] == read_json(folder / "evaluation.json")["verdict"]
        assert (folder / "report.html").is_file()


def test_the_rows_are_rendered_once(swept):
    (first, *others) = [swept.path / run["name"] / "data" / "tokens" / "train" / "tokens.int32.bin" for run in swept.runs]
    assert all(other.samefile(first) for other in others)
    assert not any(event.get("event") == "resumed" for run in swept.runs for event in read_events(swept.path / run["name"]))


def test_the_setting_with_the_lowest_validation_loss_over_the_seeds_is_chosen(swept):
    losses = {}
    for run in swept.runs:
        events = read_events(swept.path / run["name"])
        last = [event["eval_loss"] for event in events if event.get("event") == "evaluated"][-1]
        losses.setdefault(run["settings"]["stages.0.learning_rate"], []).append(last)
    summary = read_json(swept.path / "sweep.json")
    for one in summary["settings"]:
        values = losses[one["settings"]["stages.0.learning_rate"]]
        assert one["n"] == 2
        assert one["validation_loss"]["mean"] == pytest.approx(statistics.mean(values))
        assert one["validation_loss"]["sd"] == pytest.approx(statistics.stdev(values))
    lowest = min(losses, key=lambda rate: statistics.mean(losses[rate]))
    assert swept.best == {"stages.0.learning_rate": lowest} == summary["best"]


def test_the_page_names_every_run_and_the_choice(swept):
    page = swept.page.read_text()
    for run in swept.runs:
        assert run["name"] in page
    assert f"stages.0.learning_rate = {swept.best['stages.0.learning_rate']}" in page
    assert "± " in page


def test_a_sweep_goes_on_where_it_stopped_and_runs_nothing_twice(tiny, tmp_path):
    whole = given(tmp_path, tiny)
    events = []

    def stop(event):
        events.append(event)
        if event.get("event") == "sweeping" and event["number"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep_runs(whole, ["seed=0,1"], out=tmp_path / "sweep", report=stop)
    with pytest.raises(OutputInUse, match="--resume"):
        sweep_runs(whole, ["seed=0,1"], out=tmp_path / "sweep")
    begun = read_json(tmp_path / "sweep" / "sweep.json")
    assert (begun["best"], begun["why"]) == (None, "1 of 2 runs are done")
    steps = []
    done = sweep_runs(whole, ["seed=0,1"], out=tmp_path / "sweep", resume=True, report=lambda e: steps.append(e) if "loss" in e else None)
    assert len(done.runs) == 2
    assert len(steps) == 3  # the second run's three updates; the first was whole
    assert done.best is None
    assert "only the seed differs" in done.why


RATES = "stages.0.learning_rate=1e-2,1e30,1e-7"  # the second one's weights are not finite after an update
TOO_FAST = "0.learning_rate=1e30"


@pytest.fixture(scope="module")
def partly_failed(tiny, tmp_path_factory):
    """A sweep of three rates, of which one fails; what it reported, and how it was called."""
    folder = tmp_path_factory.mktemp("failing")
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(given(folder, tiny)))
    words = ["run", path, "--sweep", RATES, "--out", folder / "sweep"]
    return call(*words), call(*words, "--resume", "--json"), folder / "sweep"


def test_a_run_that_fails_ends_itself_alone_and_is_named_with_its_reason(partly_failed):
    done, _, folder = partly_failed
    summary = read_json(folder / "sweep.json")
    assert [run["name"] for run in summary["runs"]] == ["0.learning_rate=1e-2", "0.learning_rate=1e-7"]
    (failed,) = summary["failed"]
    assert (failed["name"], failed["error"]["kind"]) == (TOO_FAST, "NonFinite")
    assert done.status == 1
    assert f"run {TOO_FAST} failed: " in done.err
    assert f"{TOO_FAST}: failed: {failed['error']['what']}" in done.out
    assert f"1 of 3 runs failed: {TOO_FAST}\n  mend: each reason stands there; mend it and add --resume" in done.err
    page = (folder / "sweep.html").read_text()
    assert "The runs that failed" in page
    assert failed["error"]["what"] in html.unescape(page)


def test_the_choice_is_among_the_settings_of_which_no_run_failed(partly_failed):
    summary = read_json(partly_failed[2] / "sweep.json")
    assert summary["best"] is not None
    assert summary["why"].startswith("the lowest validation loss")
    assert summary["why"].endswith("; 1 of 3 runs failed")


def test_a_failed_run_is_tried_again_when_the_sweep_goes_on_and_no_other_is(partly_failed):
    _, again, _ = partly_failed
    events = [json.loads(line) for line in again.err.splitlines() if line.startswith("{")]
    assert again.status == 1
    assert [event["run"] for event in events if event.get("event") == "run_failed"] == [TOO_FAST]
    assert sum("loss" in event for event in events) < 3  # none but its own updates
    assert json.loads(again.out)["failed"][0]["name"] == TOO_FAST


def test_where_every_run_fails_the_first_ones_error_ends_the_sweep(tiny, tmp_path):
    with pytest.raises(NonFinite):
        sweep_runs(given(tmp_path, tiny), ["stages.0.learning_rate=1e30,1e31"], out=tmp_path / "sweep")
    assert len(read_json(tmp_path / "sweep" / "sweep.json")["failed"]) == 2


def test_the_table_of_a_sweep_stays_where_it_is_asked_to_go_on_with_other_settings_or_values(tiny, tmp_path):
    whole, folder = given(tmp_path, tiny), tmp_path / "sweep"
    sweep_runs(whole, ["seed=0,1"], out=folder)
    before = {name: (folder / name).read_bytes() for name in ("sweep.json", "sweep.html")}
    with pytest.raises(RecipeError, match="was trained with other settings or data"):
        sweep_runs(whole, ["seed=0,1"], sets=["stages.0.learning_rate=3e-3"], out=folder, resume=True)
    with pytest.raises(RecipeError, match="was trained with other settings or data"):
        sweep_runs(whole, ["seed=2,0,1"], sets=["stages.0.learning_rate=3e-3"], out=folder, resume=True)
    for axes in (["seed=1,2"], ["seed=0,1", "stages.0.learning_rate=1e-3,1e-2"]):
        with pytest.raises(RecipeError, match="the folder holds a sweep over other values") as refused:
            sweep_runs(whole, axes, out=folder, resume=True)
        assert "go on with --sweep seed=0,1, and more values" in str(refused.value)
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert len(sweep_runs(whole, ["seed=0,1,2"], out=folder, resume=True).runs) == 3


def test_a_signal_ends_the_whole_sweep(tiny, tmp_path):
    def stop(event):
        if "loss" in event:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        sweep_runs(given(tmp_path, tiny), ["seed=0,1"], out=tmp_path / "sweep", report=stop)
    assert not read_json(tmp_path / "sweep" / "sweep.json")["failed"]


def test_a_missing_file_is_refused_before_anything_is_run(tiny, tmp_path):
    whole = given(tmp_path, tiny)
    with pytest.raises(MissingFile):
        sweep_runs(whole, [f"data.train={whole['data']['train']},{tmp_path / 'no.jsonl'}"], out=tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    "done, failed, why",
    [
        (3, 0, "3 of 6 runs are done"),
        (3, 1, "3 of 6 runs are done; 1 of 6 runs failed"),
        (5, 1, "the lowest validation loss"),  # two of three settings have both seeds
        (3, 3, "all runs are done of 1 of 3 settings: there is nothing to choose; 3 of 6 runs failed"),
    ],
)
def test_nothing_is_chosen_before_the_grid_is_whole_and_of_what_is_whole_only(done, failed, why):
    grid = [parse_axis("stages.0.learning_rate=1e-2,1e-3,1e-4"), parse_axis("seed=0,1")]
    settings = [{"stages.0.learning_rate": rate, "seed": seed} for rate in grid[0][1] for seed in grid[1][1]]
    runs = [{"settings": one, "metrics": {}, "validation_loss": -float(k)} for k, one in enumerate(settings)]
    summary = _summary(grid, runs[:done], runs[done : done + failed])
    assert summary["why"].startswith(why)
    assert summary["best"] == ({"stages.0.learning_rate": "1e-3"} if why.startswith("the lowest") else None)


@pytest.mark.parametrize(
    "key, last, other",
    [
        ("stages.0.learning_rate", "dpo", True),  # another start is another reference
        ("stages.0.learning_rate", "sft", False),
        ("stages.0.learning_rate", "reward", False),
        ("stages.0.learning_rate", "orpo", False),  # it has no reference
        ("stages.0.learning_rate", "kto", True),
        ("stages.1.learning_rate", "dpo", False),
        ("stages.1.start_from", "dpo", True),
        ("stages.1.start_from", "sft", False),
        ("stages.1.objective.beta", "dpo", True),
        ("stages.1", "sft", True),
        ("stages", "sft", True),
        ("stages.0.seed", "dpo", False),
        ("data.train", "sft", True),
        ("evaluate.few_shot_k", "sft", False),
    ],
)
def test_no_setting_is_chosen_by_losses_that_are_no_common_measure(key, last, other):
    keys = _other_measures([key], of_stages({"name": "one", "objective": "sft"}, {"name": "two", "objective": last, "start_from": "one"}))
    assert keys == ([key] if other else [])
    runs = [{"settings": {key: value}, "metrics": {}, "validation_loss": loss} for value, loss in (("a", 0.5), ("b", 0.4))]
    summary = _summary([(key, ["a", "b"])], runs, [], keys)
    if "seed" in key:
        assert summary["why"] == "only the seed differs: there is nothing to choose"
    elif other:
        assert (summary["best"], summary["why"].partition(":")[0]) == (None, "NOT MEASURED")
        assert f"with another {key} " in summary["why"]
    else:
        assert summary["best"] == {key: "b"}


def test_equal_losses_choose_nothing():
    grid = [parse_axis("evaluate.few_shot_k=[1],[2]")]
    runs = [{"settings": {grid[0][0]: value}, "metrics": {}, "validation_loss": 0.5} for value in grid[0][1]]
    summary = _summary(grid, runs, [])
    assert summary["best"] is None
    assert summary["why"].startswith("several settings have the lowest validation loss")


def test_nothing_is_chosen_where_no_row_is_held_out(tiny, tmp_path):
    whole = given(tmp_path, tiny, data={"validation": 0})
    done = sweep_runs(whole, ["stages.0.learning_rate=1e-2,1e-3"], out=tmp_path / "sweep")
    assert done.best is None
    assert done.why.startswith("NOT MEASURED")


@pytest.mark.parametrize(
    "axis, want",
    [
        ("seed=0,1,2", ("seed", ["0", "1", "2"])),
        ("evaluate.few_shot_k=[1, 2],[4]", ("evaluate.few_shot_k", ["[1, 2]", "[4]"])),
        ("stages.0.method={type: lora, r: 4},full", ("stages.0.method", ["{type: lora, r: 4}", "full"])),
        ("task.description='a, b',c", ("task.description", ["'a, b'", "c"])),
    ],
)
def test_an_axis_is_split_at_the_commas_outside_brackets_and_quotes(axis, want):
    assert parse_axis(axis) == want


@pytest.mark.parametrize("axis", ["seed", "seed=", "=1,2", "seed=1,,2", "seed=1,1"])
def test_an_axis_that_names_no_values_is_refused(axis):
    with pytest.raises(RecipeError, match="--sweep"):
        parse_axis(axis)


def test_a_key_that_is_swept_twice_is_refused(tiny, tmp_path):
    with pytest.raises(RecipeError, match="`seed` is swept twice"):
        sweep_runs(given(tmp_path, tiny), ["seed=0,1", "seed=2"], out=tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    "key, values, said",
    [
        ("stages.0.learning_rate", "1e-2,fast", "valid number"),
        ("learning_rate", "1e-2,1e-3", "did you mean `stages.0.learning_rate`"),
        ("seed", "0,[1", "not readable as YAML"),
    ],
)
def test_a_wrong_key_or_value_is_refused_as_it_was_written_before_anything_is_run(tiny, key, values, said, tmp_path):
    with pytest.raises(RecipeError) as refused:
        sweep_runs(given(tmp_path, tiny), [f"{key}={values}"], sets=["stages.0.max_steps=2"], out=tmp_path / "sweep")
    assert said in str(refused.value)
    assert str(refused.value).startswith(f"--sweep {key}:")
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize("key", ["name", "output.dir"])
def test_what_names_the_runs_is_not_swept(tiny, key, tmp_path):
    with pytest.raises(RecipeError, match=f"names its runs and their folders itself, not by `{key}`"):
        sweep_runs(given(tmp_path, tiny), [f"{key}=a,b"], out=tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


def test_nothing_is_chosen_where_the_setting_changes_what_the_loss_is(tiny, tmp_path):
    done = sweep_runs(given(tmp_path, tiny), ["data.validation=0.1,0.2"], out=tmp_path / "sweep")
    assert done.best is None
    assert done.why.startswith("NOT MEASURED: with another data.validation")


@pytest.mark.parametrize("name", ["temperature", "top_p", "top_k", "max_new_tokens", "prompts_per_step", "importance_cap", ""])
def test_nothing_is_chosen_where_held_out_answers_are_sampled_under_other_settings(name):
    key = f"stages.0.rollout.{name}".rstrip(".")
    more = name in ("prompts_per_step", "importance_cap")  # how much is learned from, and how
    assert _other_measures([key], of_stages({"name": "one", "objective": "sft"})) == ([] if more else [key])


def test_a_sweep_of_a_recipe_for_several_processes_is_refused_before_anything_is_run(tiny, tmp_path):
    with pytest.raises(RecipeError, match="in one process"):
        sweep_runs(given(tmp_path, tiny, launch={"nproc_per_node": 2}), ["seed=0,1"], out=tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()
